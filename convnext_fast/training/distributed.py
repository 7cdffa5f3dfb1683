"""The processes that ``torchrun`` starts, or a single one, and what they exchange."""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.convnext import ConvNext

STRATEGIES = ("ddp", "fsdp")


class Process(NamedTuple):
    """This process: its number, how many there are, and the device it computes on."""

    rank: int
    world: int
    device: torch.device


_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


@contextmanager
def process_group(device: torch.device) -> Iterator[Process]:
    """Join the processes that ``torchrun`` started, with gloo on a CPU and NCCL on CUDA; otherwise run alone.

    Args:
        device: of the first process; a GPU without an index becomes the one of each process's local rank.

    Raises:
        ConnectionError: a call failed because another process ended.
        TimeoutError: the first process did not join within PyTorch's limit of half an hour.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Process(0, 1, device)
        return
    if device.type in _BACKENDS:
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
    store, rank, world = next(dist.rendezvous("env://"))
    store = _store_of_this_start(store, rank, world)
    dist.init_process_group(_BACKENDS.get(device.type, "gloo"), store=store, rank=rank, world_size=world)
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    except RuntimeError as error:
        # Gloo's errors have no class of their own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost another process, which ended or cannot be "
            f"reached; restart with --resume ({str(error).splitlines()[0]})"
        ) from error
    finally:
        dist.destroy_process_group()


def _store_of_this_start(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of ``store`` that only processes started together use.

    torchrun keeps one store through all restarts of a run: a process started again would find the addresses, or the
    NCCL id, of processes that have ended (https://github.com/pytorch/pytorch/issues/135712). The restart count that
    workers are given is each machine's own and does not change when machines come or go, so it cannot name the part.
    Instead the first process draws a name, and the others reply to the name they find until the first has seen their
    reply: a name left by an earlier first process is never confirmed.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("convnext_fast", own)
        for other in range(1, world):
            store.set(store.get(f"{own}/{other}").decode(), own)
        return dist.PrefixStore(own, store)
    deadline = time.monotonic() + store.timeout.total_seconds()
    while not store.check([own]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {rank} of {world}: the first process did not join within {store.timeout}")
        store.set(f"{store.get('convnext_fast').decode()}/{rank}", own)
        time.sleep(0.1)
    return dist.PrefixStore(store.get(own).decode(), store)


def shard(model: ConvNext, process: Process, dtype: torch.dtype) -> None:
    """Split the parameters over all processes, in place, by FSDP2: gathered block by block, reduced in float32.

    ``dtype``: parameters are gathered in it and computed with; each process keeps its part in float32.
    """
    # Imported here because it takes a second.
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
    """The value of each process, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all(fault: Exception | None, device: torch.device) -> None:
    """Raise the error of the first process that has one on all of them, so that none waits forever."""
    if largest_over_processes(int(fault is not None), device):
        raise next(fault for fault in from_all_processes(fault) if fault is not None)


def barrier() -> None:
    """A barrier: return when every process has called this."""
    if dist.is_initialized():
        dist.barrier()
