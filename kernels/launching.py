"""The function that makes every kernel launch: device guard, visibility to ``torch.compile``, a hook for recordings."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import torch

PLAIN = (torch.Tensor, torch.nn.Parameter)
_NOTHING = contextlib.nullcontext()
_ORDINARY = frozenset((*PLAIN, type(None), int, float))


class _LaunchHook(threading.local):
    """This thread's hook.

    Attributes:
        recording: the innermost recording in progress (see recording.py). Its ``launch`` notes each launch, which is
            then not made.
    """

    recording: Any = None


launch_hook = _LaunchHook()


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a compiler traces ``tensor``, such as a fake or functional tensor."""
    return launch_hook.recording is None and type(tensor) not in PLAIN


def with_scratch_memory(function: Callable, *args: Any, **options: Any) -> None:
    """Call ``function(*args, **options)``, which launches kernels with descriptors: Triton asks for memory for them.

    This runs in a context of its own, so that an allocator that the user gave to Triton stays in place.
    """
    import triton  # imported only when needed: models on a CPU start without it

    def call() -> None:
        triton.set_allocator(_scratch_memory)
        function(*args, **options)

    contextvars.copy_context().run(call)


def _scratch_memory(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory on the current device. PyTorch aligns to 512 bytes, which is enough for any kernel."""
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch ``kernel[grid](*args, **meta)`` on the device of its first argument, a tensor.

    ``args`` are the kernel's parameters that are not ``tl.constexpr``, ``meta`` the others and the options. With traced
    tensors, the kernel becomes a node of the compiler's graph. A recording notes the launch, which
    is then not made. A grid with a zero in it launches nothing, because CUDA refuses such a grid.
    """
    if 0 in grid:
        return
    if launch_hook.recording is not None:
        launch_hook.recording.launch(kernel, grid, args, meta)
        return
    if not _ORDINARY.issuperset(map(type, args)) and any(isinstance(a, torch.Tensor) and is_traced(a) for a in args):
        torch.library.wrap_triton(kernel)[grid](*args, **meta)
        return
    # A kernel reads memory, where the numbers of a negative view have the other sign.
    args = tuple(a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args)
    with current(args[0]):
        kernel[grid](*args, **meta)


def current(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of ``tensor`` the current one, which Triton launches on."""
    if tensor.device.type not in ("cuda", "xpu"):
        return _NOTHING
    module = torch.get_device_module(tensor.device)
    index = tensor.get_device()
    return _NOTHING if module.current_device() == index else module.device(index)
