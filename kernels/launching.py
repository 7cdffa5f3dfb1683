"""One door for every kernel launch: device guard, and visibility to ``torch.compile``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch ``kernel[grid](*args, **meta)`` on the device of its first tensor argument.

    While a compiler traces the call, the kernel is wrapped so that Inductor sees a Triton kernel instead of a Python
    call. A grid with a zero in it launches nothing, as CUDA refuses such a grid.
    """
    if 0 in grid:
        return
    if torch.compiler.is_compiling():
        torch.library.wrap_triton(kernel)[grid](*args, **meta)
        return
    first = next(arg for arg in (*args, *meta.values()) if isinstance(arg, torch.Tensor))
    guard = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **meta)
