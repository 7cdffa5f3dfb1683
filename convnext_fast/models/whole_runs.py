"""Frozen modules as steps that run one after another without a call of any module (see `ops.sequence`)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.steps import Kind, Step
from ..ops import sequence
from .layer_changes import changed, has_hooks
from .plan import ChainPlan, PatchPlan, called_by, follow, recall
from .records import STATE, Record
from .run_plan import read, step_of

_wants_gradient = operator.attrgetter("requires_grad")
_CALL = nn.Module.__call__


class WholeRuns(dict):
    """The runs that a module found, by how many parts they have. A copy of the module finds its own."""

    def __deepcopy__(self, memo: Any) -> WholeRuns:
        return WholeRuns()

    def __reduce__(self) -> Any:
        return WholeRuns, ()


class _WholeRun:
    """Parts as one sequence of steps, and the record by which it still stands for their forwards."""

    def __init__(self, root: nn.Module | None, parts: Sequence[nn.Module], steps: list[list[Step]], layers: list):
        every = list(chain.from_iterable(steps))
        self.sequence = sequence.FrozenSequence(every)
        self.ends = [count - 1 for count in accumulate(map(len, steps))]
        self.weights = [w for step in every for w in step.weights if w is not None]
        self.record = Record(root, layers)
        self._parts = () if root is not None else tuple(parts)

    def holds(self, root: nn.Module | None, parts: Sequence[nn.Module]) -> bool:
        """Whether these are the parts that were seen, and nothing about them changed."""
        same = root is not None or all(map(operator.is_, parts, self._parts))
        return same and self.record.holds(root)


def outputs_of(runs: WholeRuns, root: nn.Module | None, parts: Sequence[nn.Module], x: Tensor) -> list[Tensor] | None:
    """x (N, C, H, W) through frozen modules: what comes out of each; None where they have to be called one by one.

    Args:
        runs: where what was found is kept.
        root: the module that runs, if it is the only one of ``parts``. Its hooks are not looked at: they run anyway.
        parts: the modules, in order.
    """
    first = parts[0].__dict__.get(STATE)
    if first is None or first.trainable is None or not sequence.serves(x):
        return None
    if torch.compiler.is_compiling():
        steps = _steps_of_parts(root, parts, None)
        ends = [] if steps is None else [count - 1 for count in accumulate(map(len, steps))]
        return None if steps is None else sequence.compiled(list(chain.from_iterable(steps)), x, ends)
    run = runs.get(len(parts))
    if run is None or not run.holds(root, parts):
        run = _find_run(root, parts)
        if run is None:
            runs.pop(len(parts), None)
            return None
        runs[len(parts)] = run
    if torch.is_grad_enabled() and any(map(_wants_gradient, run.weights)):
        return None
    return run.sequence(x, run.ends)


def _find_run(root: nn.Module | None, parts: Sequence[nn.Module]) -> _WholeRun | None:
    layers: list[nn.Module] = []
    steps = _steps_of_parts(root, parts, layers)
    if steps is None:
        return None
    run = _WholeRun(root, parts, steps, layers)
    return run if run.record.sees(run.weights) else None


def _steps_of_parts(
    root: nn.Module | None, parts: Sequence[nn.Module], layers: list[nn.Module] | None
) -> list[list[Step]] | None:
    found = []
    for part in parts:
        steps = _steps(part, layers) if part is root else steps_of(part, layers)
        if not steps:
            return None
        found.append(steps)
    kinds = [step.kind for steps in found for step in steps]
    return None if Kind.STEM in kinds[1:] else found


def steps_of(module: nn.Module, layers: list[nn.Module] | None = None) -> list[Step] | None:
    """What a call of ``module`` does; None where that is more than frozen steps.

    layers: takes the modules that this depends on.
    """
    if not is_untouched(module):
        return None
    if layers is not None:
        layers.append(module)
    return _steps(module, layers)


def _steps(module: nn.Module, layers: list[nn.Module] | None) -> list[Step] | None:
    """As `steps_of`, whatever hooks are on the module."""
    state = module.__dict__.get(STATE)
    if state is None:
        return [] if type(module).forward is nn.Identity.forward else _joined(module._modules.values(), layers)
    plan = recall(state.key) if torch.compiler.is_compiling() else state.plan
    if not plan.fused or changed(module, plan) is not None:
        return None
    if layers is not None:
        layers += [follow(module, watched.path) for watched in plan.watched]
    if isinstance(plan, ChainPlan):
        return _joined(called_by(module), layers)
    step = None if state.trainable is None else step_of(plan, read(module, plan), state.token)
    if step is None or not _are_plain(step.weights):
        return None
    if (
        torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and any(w is not None and w.requires_grad for w in step.weights)
    ):
        return None
    following = isinstance(plan, PatchPlan) and plan.following is not None
    rest = _joined(follow(module, plan.following), layers) if following else []
    return None if rest is None else [step, *rest]


def _joined(modules: Iterable[nn.Module], layers: list[nn.Module] | None) -> list[Step] | None:
    found: list[Step] = []
    for module in modules:
        steps = steps_of(module, layers)
        if steps is None:
            return None
        found += steps
    return found


def _are_plain(weights: Iterable[Tensor | None]) -> bool:
    return all(w is None or type(w) in (nn.Parameter, Tensor) for w in weights)


_FORWARDS = [nn.Sequential.forward, nn.Identity.forward]


def runs_as_steps(kind: Any) -> Any:
    """Class decorator: the forward of ``kind`` is that of its plan."""
    _FORWARDS.append(kind.forward)
    return kind


def is_untouched(module: nn.Module, forwards: Sequence[Any] = _FORWARDS) -> bool:
    """Whether a call of ``module`` runs one of these forwards, and nothing else."""
    plain = type(module).forward in forwards and type(module).__call__ is _CALL
    return plain and "forward" not in module.__dict__ and not has_hooks(module) and module._compiled_call_impl is None
