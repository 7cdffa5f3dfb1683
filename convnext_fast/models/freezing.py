"""The state of a fused module, and freezing: for inference, a module computes with folded copies of its weights.

The copies follow the weights: the next call notices a change and folds again (see `ops.folded_weights`). A copy of a
module folds its own weights, and a pickle holds no folded weights. Training mode and loading a state_dict unfreeze.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..ops.folded_weights import new_token
from .plan import BlockPlan, ChainPlan, Path, Plan, follow, remember, weights_of
from .records import STATE, Record
from .run_plan import Read
from .whole_runs import WholeRuns


class State:
    """The state of a `FusedModule`. It is replaced when the plan changes, and by freezing and unfreezing.

    Attributes:
        plan: where its layers are.
        key: stands for the plan in this process (see `plan.remember`).
        trainable: for a frozen module, the paths of the parameters that required gradients before; otherwise None.
        token: for a frozen module, the tensor that its folded weights are kept with.
        seen: the record that shows whether the plan still holds, and what the plan read; None before these are made.
        whole: the runs of steps that replace its forward, once found.
        cuda_graph: for a frozen module, whether these runs are captured and replayed as CUDA graphs.
    """

    def __init__(self, plan: Plan, trainable: tuple[Path, ...] | None = None, cuda_graph: bool = False):
        self.plan, self.trainable, self.cuda_graph = plan, trainable, cuda_graph
        self.key = remember(plan)
        self.token = None if trainable is None else new_token()
        self.seen: tuple[Record, Read] | None = None
        self.whole = WholeRuns()

    def __deepcopy__(self, memo: Any) -> State:
        return State(self.plan, self.trainable, self.cuda_graph)

    def __reduce__(self) -> Any:
        return State, (self.plan, self.trainable, self.cuda_graph)


def state_of(module: nn.Module) -> State | None:
    """The state of a `FusedModule`; None for any other module."""
    return vars(module).get(STATE)


def set_plan(module: nn.Module, plan: Plan) -> None:
    """Give a `FusedModule` a plan, or replace the one it has."""
    state = state_of(module)
    setattr(module, STATE, State(plan) if state is None else State(plan, state.trainable, state.cuda_graph))


def is_frozen(module: nn.Module) -> bool:
    """Whether ``module`` itself is frozen."""
    state = state_of(module)
    return state is not None and state.trainable is not None


def freeze(module: nn.Module, cuda_graph: bool = False) -> None:
    """Make a module that has a plan compute with folded copies of its weights, and turn off the weights' gradients."""
    state = state_of(module)
    before = set(state.trainable or ())
    for path, parameter in _parameters(module, state.plan):
        if parameter.requires_grad:
            before.add(path)
            parameter.requires_grad_(False)
    setattr(module, STATE, State(state.plan, tuple(sorted(before)), cuda_graph))


def check_has_graphs(model: nn.Module) -> None:
    """Raise ValueError unless all parameters of ``model`` are on CUDA devices."""
    others = sorted({str(p.device) for p in model.parameters() if p.device.type != "cuda"})
    if others:
        raise ValueError(f"cuda_graph=True: the model is on {', '.join(others)}: expected it on a CUDA device")


def unfreeze(module: nn.Module) -> None:
    """Undo `freeze`, if the module is frozen."""
    if not is_frozen(module):
        return
    state = state_of(module)
    setattr(module, STATE, State(state.plan))
    for *path, name in state.trainable:
        parameter = getattr(follow(module, tuple(path)), name, None)
        if isinstance(parameter, nn.Parameter):
            parameter.requires_grad_(True)


def _parameters(module: nn.Module, plan: Plan) -> Iterator[tuple[Path, nn.Parameter]]:
    """The parameters that the plan reads, with their paths."""
    if isinstance(plan, ChainPlan):
        return
    for path in dict.fromkeys((plan.norm, *(path for path, _ in weights_of(plan)))):
        layer = follow(module, path)
        for name, parameter in {} if layer is None else layer._parameters.items():
            if parameter is not None:
                yield (*path, name), parameter
    gamma = getattr(module, plan.gamma, None) if isinstance(plan, BlockPlan) and plan.gamma else None
    if gamma is not None:
        yield (plan.gamma,), gamma
