"""Modules run as steps, without being called: frozen ones (`ops.sequence`), and on a GPU others, too
(`ops.live_sequence`).
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import choose
from ..backends.steps import Kind, Step
from ..ops import call, live_sequence, sequence
from .layer_changes import changed, has_hooks, is_changed
from .plan import ChainPlan, PatchPlan, called_by, follow, recall
from .records import STATE, Record
from .run_plan import read, step_of

_wants_gradient = operator.attrgetter("requires_grad")  # which Dynamo does not trace
_CALL = nn.Module.__call__
_dynamo_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback


class WholeRuns(dict):
    """The runs found for a module, by whether they are frozen and how many modules they contain.

    A copy of the module finds its own. A search for a run takes as long as several calls. If it finds nothing, or the
    run no longer holds at the next call, the pause before the next search grows.

    Attributes:
        pause: how many calls pass between the next search and the one after it.
        left: how many calls pass before the next search.
    """

    def __init__(self) -> None:
        self.pause = self.left = 0

    def __deepcopy__(self, memo: Any) -> WholeRuns:
        return WholeRuns()

    def __reduce__(self) -> Any:
        return WholeRuns, ()

    def may_look(self) -> bool:
        """Count a call; return whether it searches for a run."""
        self.left -= 1
        if self.left >= 0:
            return False
        self.left, self.pause = self.pause, min(2 * self.pause + 1, _LONGEST_PAUSE)
        return True


_LONGEST_PAUSE = 255


class _WholeRun:
    """Modules as one sequence of steps, and the record that shows whether it still replaces their forwards."""

    def __init__(
        self,
        frozen: bool,
        cuda_graph: bool,
        root: nn.Module | None,
        parts: Sequence[nn.Module],
        steps: list[list[Step]],
        layers: list,
    ):
        every = list(chain.from_iterable(steps))
        self.sequence = sequence.FrozenSequence(every, cuda_graph) if frozen else live_sequence.LiveSequence(every)
        self.ends = [count - 1 for count in accumulate(map(len, steps))]
        self.weights = _weights(every)
        self.record = Record(root, layers)
        self._parts = () if root is not None else tuple(parts)

    def holds(self, root: nn.Module | None, parts: Sequence[nn.Module]) -> bool:
        """Whether these are the recorded modules, and nothing about them changed."""
        same = root is not None or all(map(operator.is_, parts, self._parts))
        return same and self.record.holds(root)


def outputs_of(
    runs: WholeRuns, root: nn.Module | None, parts: Sequence[nn.Module], x: Tensor, last: bool = False
) -> list[Tensor] | None:
    """The outputs of modules that run one after another on x (N, C, H, W); None if they have to be called one by one.

    Args:
        runs: the runs found so far; a new one is added.
        root: the module whose forward runs, if it is the only one of ``parts``. Its hooks run anyway: no need to check.
        parts: the modules, in order.
        last: return only the last one's output.
    """
    state = parts[0].__dict__.get(STATE)
    fused = state is not None and state.plan.fused and not call.sees_layers(x)
    backend = sequence.backend_for(x) if fused else None
    if backend is None:
        return None
    frozen = state.trainable is not None and not call.autocasts(x)
    if not frozen and backend != "triton":
        return None
    if torch.compiler.is_compiling():
        steps = _steps_of_parts(frozen, root, parts, None)
        if steps is None:
            return None
        every, ends = list(chain.from_iterable(steps)), [count - 1 for count in accumulate(map(len, steps))]
        ends = ends[-1:] if last else ends
        if not frozen and (call.autocasts(x) or call.wants_gradient(x, *_weights(every)) or any(map(_drops, every))):
            return live_sequence.compiled(every, x, ends)
        return None if call.wants_gradient(x) else sequence.compiled(every, x, ends, frozen)
    compiles = callable(_dynamo_callback())  # Dynamo skipped this frame and would compile those within, piece by piece
    run = torch.compiler.disable(_run) if compiles else _run
    return run(runs, frozen, backend, state.cuda_graph, root, parts, x, last)


def _run(
    runs: WholeRuns,
    frozen: bool,
    backend: choose.Name,
    cuda_graph: bool,
    root: nn.Module | None,
    parts: Sequence[nn.Module],
    x: Tensor,
    last: bool,
) -> list[Tensor] | None:
    run = _run_that_holds(runs, frozen, cuda_graph, root, parts)
    if run is None or (frozen and any(map(_wants_gradient, run.weights))):  # under no_grad too: they are trained
        return None
    ends = run.ends[-1:] if last else run.ends
    return run.sequence(x, ends, backend) if frozen else run.sequence(x, ends)


def _run_that_holds(
    runs: WholeRuns, frozen: bool, cuda_graph: bool, root: nn.Module | None, parts: Sequence[nn.Module]
) -> _WholeRun | None:
    key = frozen, len(parts)
    run = runs.get(key)
    if run is not None and run.holds(root, parts):
        runs.pause = runs.left = 0
        return run
    runs.pop(key, None)
    if not runs.may_look():
        return None
    layers: list[nn.Module] = []
    steps = _steps_of_parts(frozen, root, parts, layers)
    if steps is None and frozen and cuda_graph and (root is None or isinstance(root.__dict__[STATE].plan, ChainPlan)):
        kind = ", ".join(type(part).__name__ for part in parts)
        warnings.warn(f"no CUDA graph of {kind}: {_reason(root, parts)}", RuntimeWarning, stacklevel=6)
    run = None if steps is None else _WholeRun(frozen, cuda_graph, root, parts, steps, layers)
    if run is None or not run.record.sees(run.weights):
        return None
    runs[key] = run
    return run


def _steps_of_parts(
    frozen: bool, root: nn.Module | None, parts: Sequence[nn.Module], layers: list[nn.Module] | None
) -> list[list[Step]] | None:
    found = []
    for part in parts:
        steps = _steps(part, frozen, layers) if part is root else steps_of(part, frozen, layers)
        if not steps:
            return None
        found.append(steps)
    kinds = [step.kind for steps in found for step in steps]
    return None if Kind.STEM in kinds[1:] else found


def steps_of(module: nn.Module, frozen: bool = True, layers: list[nn.Module] | None = None) -> list[Step] | None:
    """The steps that a call of ``module`` does; None if it does more, or if ``frozen`` and not all of them are frozen.

    layers: the modules that this depends on are added to it.
    """
    if not is_untouched(module):
        return None
    if layers is not None:
        layers.append(module)
    return _steps(module, frozen, layers)


def _steps(module: nn.Module, frozen: bool, layers: list[nn.Module] | None) -> list[Step] | None:
    """As `steps_of`, without checking the module itself for hooks."""
    state = module.__dict__.get(STATE)
    if state is None:
        return [] if type(module).forward is nn.Identity.forward else _joined(module._modules.values(), frozen, layers)
    plan = recall(state.key) if torch.compiler.is_compiling() else state.plan
    if not plan.fused or is_changed(module, plan):
        return None
    if layers is not None:
        layers += [follow(module, watched.path) for watched in plan.watched]
    if isinstance(plan, ChainPlan):
        checkpoints = not frozen and vars(module).get("checkpointing") is not None
        return None if checkpoints else _joined(called_by(module), frozen, layers)
    if frozen and state.trainable is None:
        return None
    step = step_of(module, plan, read(module, plan), state.token)
    if not _are_plain(step.weights):
        return None
    if torch.compiler.is_compiling() and frozen and any(w.requires_grad for w in _weights([step])):
        return None
    following = isinstance(plan, PatchPlan) and plan.following is not None
    rest = _joined(follow(module, plan.following), frozen, layers) if following else []
    return None if rest is None else [step, *rest]


def _are_plain(weights: Iterable[Tensor | None]) -> bool:
    return all(w is None or type(w) in (nn.Parameter, Tensor) for w in weights)


def _weights(steps: Iterable[Step]) -> list[Tensor]:
    return [w for step in steps for w in step.weights if w is not None]


def _drops(step: Step) -> bool:
    return step.draw is not None and step.draw.args[0].training


def _reason(root: nn.Module | None, parts: Sequence[nn.Module]) -> str:
    """Why frozen modules do not run as steps."""
    for part in parts:
        for name, module in part.named_modules():
            where, state = name or type(module).__name__, module.__dict__.get(STATE)
            if module is not root and has_hooks(module):
                return f"hooks on {where}"
            change = None if state is None else changed(module, state.plan)
            if change is not None:
                return f"in {where}, {change}"
            if state is not None and not isinstance(state.plan, ChainPlan) and state.trainable is None:
                return f"{where} is not frozen"
    return "it does more than call what it holds"


def _joined(modules: Iterable[nn.Module], frozen: bool, layers: list[nn.Module] | None) -> list[Step] | None:
    found: list[Step] = []
    for module in modules:
        steps = steps_of(module, frozen, layers)
        if steps is None:
            return None
        found += steps
    return found


_FORWARDS = [nn.Sequential.forward, nn.Identity.forward]


def runs_as_steps(kind: Any) -> Any:
    """Class decorator: the forward of ``kind`` does what its plan says."""
    _FORWARDS.append(kind.forward)
    return kind


def is_untouched(module: nn.Module, forwards: Sequence[Any] = _FORWARDS) -> bool:
    """Whether a call of ``module`` runs one of these forwards, and nothing else."""
    plain = type(module).forward in forwards and type(module).__call__ is _CALL
    return plain and "forward" not in module.__dict__ and not has_hooks(module) and module._compiled_call_impl is None
