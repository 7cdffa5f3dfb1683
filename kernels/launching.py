"""One door for every kernel launch: device guard, a short way to known kernels, visibility to ``torch.compile``."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NOTHING = contextlib.nullcontext()
_ORDINARY = frozenset((*_PLAIN, type(None), int, float))
_compiled: dict[tuple[Hashable, ...], tuple[Any, tuple]] = {}


def traced(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` stands for one in a compiler's graph, a fake or functional tensor, say: it is no plain one."""
    return type(tensor) not in _PLAIN


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch ``kernel[grid](*args, **meta)`` on the device of its first argument, a tensor.

    ``args`` are all of the kernel's parameters that are no ``tl.constexpr``, ``meta`` the others and the options.
    Tensors that a compiler traces make the kernel a node of its graph instead of a Python call. A grid with a zero in
    it launches nothing, as CUDA refuses such a grid.
    """
    if 0 in grid:
        return
    if not _ORDINARY.issuperset(map(type, args)) and any(isinstance(a, torch.Tensor) and traced(a) for a in args):
        torch.library.wrap_triton(kernel)[grid](*args, **meta)
        return
    first: torch.Tensor = args[0]
    if not first.is_cuda or torch.version.hip is not None:
        with _guard(first):
            kernel[grid](*args, **meta)
        return
    index = first.get_device()
    if index == torch.cuda.current_device():
        launch_again(kernel, index, grid, args, meta)
    else:
        with torch.cuda.device(index):
            launch_again(kernel, index, grid, args, meta)


def launch_again(kernel: Any, device: int, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
    """Launch ``kernel[grid](*args, **meta)``, by what Triton compiled where it has been launched alike before.

    Triton's own way costs the host about 20 µs a launch, most of which goes into finding that compiled kernel. It
    depends on no more than ``_likeness``; ``compiled[grid]`` takes the values of all parameters in order.
    """
    key = _likeness(kernel, device, args, meta)
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **meta)
        constants = tuple(meta.get(p.name, p.default) for p in kernel.params[len(args) :])
        _compiled[key] = compiled, constants
        return
    compiled, constants = found
    compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*args, *constants)


def _likeness(kernel: Any, device: int, args: tuple, meta: dict[str, Any]) -> tuple[Hashable, ...]:
    """What Triton tells NVIDIA kernels apart by, or finer: types, alignment, integers 1, multiples of 16 or 64-bit."""
    key = [id(kernel), device, *meta, *meta.values()]  # a kernel is its module's, which outlives its launches
    for value in args:
        kind = type(value)
        if kind in _PLAIN:
            key.append((value.dtype, value.data_ptr() % 16))
        elif kind is int:
            key.append(("int", value == 1, value % 16 == 0, -(2**31) <= value < 2**31))
        else:
            key.append(kind)
    return tuple(key)


def _guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of ``tensor`` the current one."""
    if tensor.device.type not in ("cuda", "xpu"):
        return _NOTHING
    return torch.get_device_module(tensor.device).device(tensor.device)
