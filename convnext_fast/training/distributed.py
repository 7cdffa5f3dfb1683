"""The process group that ``torchrun`` sets up, or a single process without one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


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
    finally:
        dist.destroy_process_group()


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of ``value`` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()
