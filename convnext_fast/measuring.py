"""Timing calls and counting their memory: shared by ``convnext-fast bench`` and the benchmarks in ``bench/``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


def synchronise(device: torch.device) -> None:
    """Wait for all work that was started on an accelerator."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def seconds(calls: Sequence[Call], device: torch.device) -> float:
    """Seconds per call, of ``calls`` run back to back.

    CUDA and ROCm: by two events on the current stream, so that the calls queue up behind one another; other
    accelerators and CPUs: by the wall clock, between two synchronisations.
    """
    synchronise(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)
    begun = time.perf_counter()
    for call in calls:
        call()
    synchronise(device)
    return (time.perf_counter() - begun) / len(calls)


def alternate(calls: Sequence[Call], device: torch.device, rounds: int) -> list[list[float]]:
    """Seconds of each of ``calls`` in each round; interleaved, so that all see the same machine speed."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            taken.append(seconds([call], device))
    return times


def saved_bytes(call: Call, owned: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass during ``call``, without those of ``owned``."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    for tensor in owned:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak_bytes(call: Call, device: torch.device) -> int:
    """Peak bytes that ``call`` allocates on an accelerator beyond what was allocated before, by PyTorch's allocator."""
    memory = getattr(torch, device.type)
    synchronise(device)
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device)
    call()
    synchronise(device)
    return memory.max_memory_allocated(device) - before


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN or a shape that differs counts as infinite."""
    if actual.shape != expected.shape:
        return float("inf")
    norm = expected.double().norm()
    difference = float((actual.double() - expected.double()).norm() / (norm if norm else 1.0))
    return difference if difference == difference else float("inf")
