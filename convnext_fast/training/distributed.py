"""The process group that ``torchrun`` sets up, or a single process without one, and what processes tell each other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..model import ConvNext

STRATEGIES = ("ddp", "fsdp")


class Process(NamedTuple):
    """This process: its number, how many there are, and the device it computes on."""

    rank: int
    world: int
    device: torch.device


_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


@contextmanager
def process_group(device: torch.device) -> Iterator[Process]:
    """Join the processes that ``torchrun`` started (by its environment), gloo on CPU and nccl on CUDA; else be alone.

    Args:
        device: of the first process; a GPU without an index becomes the one of each process's local rank.

    Raises:
        ConnectionError: in place of the error that a call meets when another process has ended.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Process(0, 1, device)
        return
    if device.type in _BACKENDS:
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group(_BACKENDS.get(device.type, "gloo"))
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    except RuntimeError as error:
        # Gloo's errors have no class of their own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            f"process {dist.get_rank()} of {dist.get_world_size()} has lost another, which has ended or cannot be "
            f"reached; start again with --resume ({str(error).splitlines()[0]})"
        ) from error
    finally:
        dist.destroy_process_group()


def shard(model: ConvNext, process: Process, dtype: torch.dtype) -> None:
    """Split the parameters over all processes, in place, by FSDP2: gathered block by block, reduced in float32.

    Args:
        model: the same on every process, on the device of ``process``.
        process: this process.
        dtype: parameters are gathered in it and computed with; each process keeps its part in float32.
    """
    # Importing FSDP takes a second that no run without it should wait.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # FSDP2 warns that changes in place of a block's output, which is a view, would break its hooks. There are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(process.device.type, (process.world,))
    narrow = None if dtype == torch.float32 else dtype
    # Inputs are left alone: the residual stream stays float32, as it does under autocast alone.
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    for part in [*model.blocks(), model]:
        # Gathered parameters that outlived a forward pass would be stale after the average's next update.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of ``value`` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def largest_over_processes(value: int, device: torch.device) -> int:
    """The largest ``value`` of all processes."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def from_all_processes(value: object) -> list:
    """What each process has passed, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(fault: Exception | None, device: torch.device) -> None:
    """Raise the fault of the first process that has one, on all of them, so that none waits for another in vain."""
    if largest_over_processes(int(fault is not None), device):
        raise next(fault for fault in from_all_processes(fault) if fault is not None)


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()
