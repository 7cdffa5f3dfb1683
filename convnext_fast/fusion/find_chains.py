"""Recognise the containers of a fused model that only call what they hold, one after another.

Frozen, or on a GPU, such a container runs all that is in it as one sequence of steps. A `torch.nn.Sequential` of blocks
and patch layers is one; so may be a stage, whose forward is then confirmed by running it with stand-ins. Nothing here
changes a module.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..models.freezing import state_of
from ..models.layer_changes import own_tensors
from ..models.plan import ChainPlan, Path, called_by, settings_of, watch
from ..models.switches import ConvNextSwitches
from .confirm import confirm_chain
from .layer_kinds import Unfusable, check_forward


def find_chains(model: nn.Module, fused: Collection[int]) -> list[tuple[nn.Module, ChainPlan]]:
    """Each container of ``model``, with its plan; ``fused``: the ``id`` of each module that runs by a plan itself."""
    found: list[tuple[nn.Module, ChainPlan]] = []
    _collect(model, fused, found, {})
    return found


def _collect(
    module: nn.Module, fused: Collection[int], found: list[tuple[nn.Module, ChainPlan]], seen: dict[int, int | None]
) -> int | None:
    """How many fused modules a call of ``module`` runs one after another; None where it does more than that."""
    if id(module) in seen:
        return seen[id(module)]
    seen[id(module)] = count = None  # of a module that is called within itself
    state = state_of(module)
    if id(module) in fused or (state is not None and not (isinstance(state.plan, ChainPlan) and state.plan.parts)):
        count = 1
    elif type(module).forward is nn.Identity.forward:
        count = 0
    elif not isinstance(module, ConvNextSwitches):
        counts = [_collect(child, fused, found, seen) for child in called_by(module)]
        plain = type(module).forward is nn.Sequential.forward
        if None not in counts and (plain or sum(counts)):
            count = sum(counts)
            try:
                plan = ChainPlan() if plain else _plan_of(module)
            except Unfusable:
                count = None
            if count is not None and (count > 1 or not plain):
                found.append((module, plan))
    seen[id(module)] = count
    return count


def _plan_of(container: nn.Module) -> ChainPlan:
    check_forward(container)
    if own_tensors(container):
        raise Unfusable("it has tensors of its own")
    confirm_chain(container)
    settings = settings_of(container)
    names, values = (tuple(setting[i] for setting in settings) for i in range(2))
    watched = tuple(watch(container, path) for path in _lists(container))
    return ChainPlan(tuple(container._modules), watched, names, values)


def _lists(container: nn.Module, path: Path = ()) -> list[Path]:
    """Where the lists in a container are, whose modules it calls."""
    found = []
    for name, child in container._modules.items():
        if isinstance(child, nn.ModuleList):
            found += [(*path, name), *_lists(child, (*path, name))]
    return found
