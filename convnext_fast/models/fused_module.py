"""The single mechanism by which a module computes with the weights of its layers instead of calling them.

A `FusedModule` has a plan (see `plan`). Its forward checks once whether the plan still holds, and then runs the plan's
op on the live parameters. If the plan does not hold, the module warns and runs its plain forward, which calls the
layers: users replace layers (adapters, quantisation, a dilated convolution) and register hooks on them, and both have
to keep working. Frozen modules run as steps (see `whole_runs`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import call
from .ahead import AHEAD
from .freezing import State, unfreeze
from .layer_changes import changed, full_name, is_changed
from .plan import ChainPlan, Plan, calls_others, follow, recall
from .records import Record
from .run_plan import Read, read, run
from .whole_runs import outputs_of, runs_as_steps


@runs_as_steps
class FusedModule(nn.Module):
    """A module that runs its plan's op, or else its plain forward.

    The names that this class adds are private, because a class of another library may use any public name.
    """

    _convnext_fast: State | None = None

    def _plain_forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W') by calling the layers."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        y = fused_forward(self, x)
        return self._plain_forward(x) if y is None else y

    def _convnext_fast_changed(self) -> bool:
        """Whether the plan no longer holds. A compiler takes the answer at compile time as a constant."""
        return changed(self, self._convnext_fast.plan) is not None

    _convnext_fast_changed._dynamo_marked_constant = True

    def __prepare_scriptable__(self) -> Any:
        """`torch.jit.script` calls this first."""
        raise TypeError(
            "torch.jit.script does not compile fused modules, which look at their layers in Python: "
            "call unfuse(model) first, or use torch.jit.trace or torch.export, which take them as they are"
        )

    def train(self, mode: bool = True) -> Any:
        """As `torch.nn.Module.train`; training mode undoes freezing."""
        if mode:
            unfreeze(self)
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        unfreeze(self)
        super()._load_from_state_dict(*args, **kwargs)


def fused_forward(module: FusedModule, x: Tensor) -> Tensor | None:
    """The output of ``module`` for x by its plan; None if the plain forward has to run."""
    state = module._convnext_fast
    if state is None or call.sees_layers(x):  # without a state: a slice of a fused `torch.nn.Sequential`
        return None
    compiles = torch.compiler.is_compiling()
    if not compiles and AHEAD.known:
        y = AHEAD.output(module, x)
        if y is not None:
            return y
    plan = recall(state.key) if compiles else state.plan
    if not plan.fused:
        return None
    if state.trainable is not None or calls_others(plan):
        outputs = outputs_of(state.whole, module, (module,), x)
        if outputs is not None:
            return outputs[0]
    if isinstance(plan, ChainPlan):
        return None
    found = _read_if_it_holds(module, state, plan)
    if found is None:
        return None
    return run(module, plan, found, x)


def _read_if_it_holds(module: nn.Module, state: State, plan: Plan) -> Read | None:
    if torch.compiler.is_compiling():
        return None if is_changed(module, plan) else read(module, plan)
    seen = state.seen
    if seen is not None and seen[0].holds(module):
        return seen[1]
    reason = changed(module, plan)
    if reason is not None:
        kind = full_name(type(module))
        warnings.warn(f"a fused {kind} calls its layers one by one: {reason}", RuntimeWarning, stacklevel=4)
        return None
    found = read(module, plan)
    record = Record(module, [follow(module, watched.path) for watched in plan.watched])
    state.seen = (record, found) if record.sees(found.weights) else None
    return found


def outputs_in_turn(modules: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """The outputs of ``modules``, called one after another, starting with x."""
    outputs = []
    for module in modules:
        x = module(x)
        outputs.append(x)
    return outputs
