"""The target that a launch is tuned for: a name that the functions of the ``tuning`` files take.

An unknown device takes the nearest older target (compute capability 8.9, the RTX 40 and the L4, takes sm_86), and a
tensor on the CPU (the interpreter, or a tool that executes compiled code) takes sm_80.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
PROCESSORS = {"sm_80": 108, "sm_86": 72, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
"""Streaming multiprocessors (compute units) of each target's usual chip, for the number of programs that fills it."""
SHARED_BYTES = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
"""Shared memory (LDS) that a program may have."""
_planned: list[str] = []


@functools.cache
def _target_of_cuda(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    known = [name for name in TARGETS if name.startswith("sm_") and int(name[3:]) <= 10 * major + minor]
    if not known:
        raise RuntimeError(
            f"the Triton kernels need compute capability 8.0, cuda:{index} has {major}.{minor}: "
            "set CONVNEXT_FAST_BACKEND=reference for compiled models on such a device"
        )
    return known[-1]


def target_of(tensor: torch.Tensor) -> str:
    """The target, one of ``TARGETS``, for which a launch on ``tensor`` is configured."""
    if _planned:
        return _planned[-1]
    if tensor.is_cuda:
        return _target_of_cuda(tensor.device.index)
    return TARGETS[0]


@contextlib.contextmanager
def planned_for(target: str) -> Iterator[None]:
    """Within, launches are configured for ``target`` on any device: for code that compiles but does not run."""
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    _planned.append(target)
    try:
        yield
    finally:
        _planned.pop()
