"""Replay: calls of the kernels that repeat what an earlier call of the same kind did on the host.

Which form of a kernel runs, in which configuration, on what grid and with what memory between the launches, depends on
the shapes, strides, dtypes and alignments of a call's tensors and on its other arguments, never on values. Working this
out takes the host longer than most kernels run. So the first call of its kind is recorded as a plan (recording.py),
which this call and later ones replay with the addresses of their own tensors. On NVIDIA that is one call of C
(native_plan.py); without a C compiler, Python replays the plan. A call that does anything except allocate, take views
and launch has no plan: it runs normally, without a replay.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import knobs

from . import autotuning, native_plan
from .launching import current, launch_hook
from .recording import TENSORS, Plan, leaves, record

Function = TypeVar("Function", bound=Callable)
MOST = 512
"""The most kinds of calls remembered per function; when there are more, as with many sizes, all are dropped."""
_RECORDING = threading.RLock()
"""Lets one thread at a time make first calls: Triton would compile a kernel in each thread that asks for it."""
_VALUES = frozenset((type(None), int, float, str, bool, torch.dtype))


def is_replayable(tensor: Tensor) -> bool:
    """Whether calls on ``tensor`` may be replayed: only on NVIDIA, as AMD's kernels also depend on a storage's size.

    Not under a dispatch mode, which would not see a replayed call.
    """
    return tensor.is_cuda and torch.version.hip is None and not torch._C._len_torch_dispatch_stack()


def replayed(function: Function, composed: bool = False, wait: int = 0) -> Function:
    """``function(tensor, ...)``, replaying earlier calls.

    Its arguments are tensors, None, numbers, strings, dtypes and tuples of these. It returns a tensor, or a tuple of
    tensors and None, and reads no value of a tensor on the host. ``call.calls`` remembers its calls.

    composed: the function only allocates and calls other replayed functions. Within another composed function it runs
    normally.
    wait: how many calls of a kind run normally before one is recorded. For composed functions that make few calls:
    their plans save little per call, so recording does not pay for rare sizes.
    """
    calls = Calls(function, composed, wait)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if launch_hook.recording is not None:
            return calls.within(launch_hook.recording, args)
        results = NotImplemented if calls.repeat is None else calls.repeat(calls.native, args)
        return calls.run(args) if results is NotImplemented else results

    call.calls = calls  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


composed = functools.partial(replayed, composed=True)


class Calls:
    """What is remembered of the calls of one function, by their `description`.

    Attributes:
        kinds: for each kind of call its plan; None if it cannot be recorded; a number of calls left to wait.
        native: the plans that C replays.
        wait: see `replayed`.
    """

    def __init__(self, function: Callable, composed: bool = False, wait: int = 0):
        self.function, self._composed, self.wait = function, composed, wait
        self.kinds: dict[Hashable, Any] = {}
        self.native: dict[Hashable, Any] = {}
        self.repeat: Callable[[dict[Hashable, Any], tuple], Any] | None = None  # C's, once there is a plan for it

    def run(self, args: tuple) -> Any:
        """The results of any call."""
        kind = description(args)
        plan = None if kind is None else self.kinds.get(kind, NotImplemented)
        if plan is None:
            return self.function(*args)
        with current(args[0]):
            if plan is NotImplemented or type(plan) is int:
                with _RECORDING:
                    plan = self._first(kind, args)
            return self.function(*args) if plan is None else self._repeat(kind, plan, args)

    def _first(self, kind: Hashable, args: tuple) -> Plan | None:
        """The plan for one of the first calls; None for one that runs normally."""
        left = self.kinds.get(kind, self.wait)
        if type(left) is not int:
            return left  # another thread was first
        if left:
            self._keep(kind, left - 1)
            return None
        return self._record(kind, args)

    def within(self, recording: Any, args: tuple) -> Any:
        """The results of a call made while another one is recorded."""
        kind = None if self._composed else _key(args)
        plan = None if kind is None else self.kinds.get(kind, NotImplemented)
        if plan is NotImplemented:
            plan = self._record(kind, args)
        return self.function(*args) if plan is None else recording.include(plan, args)

    def _record(self, kind: Hashable, args: tuple) -> Plan | None:
        if autotuning.ENABLED and launch_hook.recording is None:
            self.function(*args)  # times the candidates, which a recording cannot
        module = native_plan.library()
        plan = record(self.function, args, module and module.keys(args))
        self._keep(kind, plan)
        return plan

    def _keep(self, kind: Hashable, plan: Plan | int | None) -> None:
        if len(self.kinds) >= MOST and kind not in self.kinds:
            self.forget()
        self.kinds[kind] = plan

    def _repeat(self, kind: Hashable, plan: Plan, args: tuple) -> Any:
        """Replay a call that C did not: it had no plan, launch hooks are set, or another device was current."""
        native = native_plan.of(plan)
        if native is not None:
            self.native[kind] = native
            self.repeat = native_plan.library().repeat
            results = self.repeat(self.native, args)
            if results is not NotImplemented:
                return results
        return plan.repeat(args)

    def forget(self) -> None:
        """Record every kind of call again."""
        self.kinds.clear()
        self.native.clear()


def description(args: tuple) -> Hashable | None:
    """Everything that a call depends on except values; None if it cannot be replayed.

    With a C compiler this is C's own key. It does not mark negative views, whose memory holds other values: the caller
    resolves them.
    """
    return _key(args) if is_replayable(args[0]) else None


def _key(args: tuple) -> Hashable | None:
    module = native_plan.library()
    key = module and module.key(args)
    return kind_of(args) if key is None else key


def is_observed() -> bool:
    """Whether Triton's launch hooks, such as a profiler's, or a recording must see each launch."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return launch_hook.recording is not None or any(hook and getattr(hook, "calls", True) for hook in hooks)


def kind_of(args: tuple) -> tuple[Hashable, ...] | None:
    """Everything that a call depends on except values; None if an argument has a type that `replayed` does not name."""
    key: list[Hashable] = [native_plan.float32_precision()]
    for arg in leaves(args):
        kind = type(arg)
        if kind in TENSORS and not arg.is_neg():
            key += (arg.shape, arg.stride(), arg.dtype, arg.device, arg.data_ptr() % 16)
        elif kind in _VALUES:
            key += (kind, arg)
        elif isinstance(arg, tuple):
            key += (kind, len(arg))
        else:
            return None
    return tuple(key)
