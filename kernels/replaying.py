"""Replay: calls of the kernels that repeat what an earlier call of the same kind did on the host.

Which form of a kernel runs, in which configuration, on what grid and with what memory between the launches, depends on
the shapes, strides, dtypes and alignments of a call's tensors and on its other arguments, never on values. Working this
out takes the host longer than most kernels run. So the first call of its kind is recorded as a plan (recording.py), and
later ones repeat the plan with the addresses of their own tensors. On NVIDIA that is one call of C (native_plan.py);
without a C compiler, Python repeats the plan. A call that does anything except allocate, take views and launch is not
recorded. As the first may tune kernels, the second has another chance.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import knobs

from . import native_plan
from .launching import PLAIN, current, launch_hook
from .recording import Plan, leaves, record

Function = TypeVar("Function", bound=Callable)
MOST = 512
"""The most kinds of calls remembered per function; when there are more, as with many sizes, all are dropped."""
_RECORDING = threading.RLock()
"""One thread at a time makes first calls: Triton would compile a kernel once in each thread that asks for it."""
_VALUES = frozenset((type(None), int, float, str, bool, torch.dtype))


def is_replayable(tensor: Tensor) -> bool:
    """Whether calls on ``tensor`` may be repeated: on NVIDIA, as AMD's kernels also depend on a storage's size.

    Dispatch modes would not see what is repeated. A recording does: of eighteen blocks, four kinds are worked out.
    """
    modes = torch._C._len_torch_dispatch_stack()
    return tensor.is_cuda and torch.version.hip is None and modes == launch_hook.recordings


def replayed(function: Function) -> Function:
    """``function(tensor, ...)``, repeating earlier calls.

    Its arguments are tensors, None, numbers, strings, dtypes and tuples of these. It returns a tensor, or a tuple of
    tensors and None, and reads no value of a tensor on the host. ``call.calls`` is what is remembered of it.
    """
    calls = Calls(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        results = NotImplemented if calls.repeat is None else calls.repeat(calls.native, args)
        return calls.run(args) if results is NotImplemented else results

    call.calls = calls  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


class Known:
    """A plan, and the same for C from its first use on."""

    def __init__(self, plan: Plan, device: int):
        self.plan, self._device = plan, device

    @functools.cached_property
    def native(self) -> Any | None:
        """The plan as C takes it; None where C cannot repeat it."""
        return native_plan.build(self.plan, self._device)


class Calls:
    """What is remembered of the calls of one function.

    Attributes:
        kinds: for each kind of call its plan; None where there can be none, "again" where the first call had none.
        native: the plans that C repeats, by C's own key, which tells no fewer kinds apart but for negative views:
            who calls resolves them.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.kinds: dict[tuple[Hashable, ...], Known | str | None] = {}
        self.native: dict[bytes, Any] = {}
        self.repeat: Callable[[dict[bytes, Any], tuple], Any] | None = None  # C's function, once there is a plan for it

    def run(self, args: tuple) -> Any:
        """The results of any call."""
        kind = kind_of(args) if is_replayable(args[0]) else None
        known = self.kinds.get(kind, "new") if kind is not None else None
        if isinstance(known, str):
            with _RECORDING:
                known = self.kinds.get(kind, "new")  # another thread may have been first
                if isinstance(known, str):
                    return self._record(kind, known, args)
        if known is None:
            return self.function(*args)
        with current(args[0]):
            return self._repeat(known, args)

    def _record(self, kind: tuple[Hashable, ...], known: str, args: tuple) -> Any:
        results, plan = record(self.function, args)
        if len(self.kinds) >= MOST:
            self.forget()
        without = "again" if known == "new" else None
        self.kinds[kind] = without if plan is None else Known(plan, args[0].get_device())
        return results

    def _repeat(self, known: Known, args: tuple) -> Any:
        """C finds no plan for this call, or may not repeat it: launch hooks are set, or another device was current."""
        module = native_plan.library() if launch_hook.recordings == 0 and known.native is not None else None
        key = module and module.key(args)
        if key is not None:
            if len(self.native) >= MOST:
                self.native.clear()
            self.native[key] = known.native
            self.repeat = module.repeat
            results = module.repeat(self.native, args)
            if results is not NotImplemented:
                return results
        return known.plan.repeat(args)

    def forget(self) -> None:
        """Record every kind of call again."""
        self.kinds.clear()
        self.native.clear()


def description(args: tuple) -> Hashable | None:
    """As `kind_of`, from C where C is there; it tells no negative views apart."""
    module = native_plan.library() if is_replayable(next(arg for arg in leaves(args) if type(arg) in PLAIN)) else None
    return kind_of(args) if module is None else module.key(args)


def is_observed() -> bool:
    """Whether Triton's launch hooks, a profiler's, or a recording want to hear of each launch."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return launch_hook.listener is not None or any(hook and getattr(hook, "calls", True) for hook in hooks)


def kind_of(args: tuple) -> tuple[Hashable, ...] | None:
    """Everything that a call depends on except values; None if an argument has a type that `replayed` does not name."""
    key: list[Hashable] = [native_plan.float32_precision()]
    for arg in leaves(args):
        kind = type(arg)
        if kind in PLAIN and not arg.is_neg():
            key += (arg.shape, arg.stride(), arg.dtype, arg.device, arg.data_ptr() % 16)
        elif kind in _VALUES:
            key += (kind, arg)
        elif isinstance(arg, tuple):
            key += (kind, len(arg))
        else:
            return None
    return tuple(key)
