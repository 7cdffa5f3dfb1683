"""One door for every kernel launch: device guard, and visibility to ``torch.compile``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def traced(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` stands for one in a compiler's graph, a fake or functional tensor, say: it is no plain one."""
    return type(tensor) not in _PLAIN


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch ``kernel[grid](*args, **meta)`` on the device of its first tensor argument.

    Tensors that a compiler traces make the kernel a node of its graph instead of a Python call. A grid with a zero in
    it launches nothing, as CUDA refuses such a grid.
    """
    if 0 in grid:
        return
    tensors = [arg for arg in (*args, *meta.values()) if isinstance(arg, torch.Tensor)]
    if any(map(traced, tensors)):
        torch.library.wrap_triton(kernel)[grid](*args, **meta)
        return
    device = tensors[0].device
    guard = (
        torch.get_device_module(device).device(device) if device.type in ("cuda", "xpu") else contextlib.nullcontext()
    )
    with guard:
        kernel[grid](*args, **meta)
