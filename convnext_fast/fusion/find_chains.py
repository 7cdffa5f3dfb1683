"""Recognise the containers of a fused model: modules that call its other modules one after another.

When frozen, or on a GPU, everything that a container calls runs as one sequence of steps. A `torch.nn.Sequential` of
blocks and patch layers is a container. So is a stage whose forward, run with stand-ins for what it calls, does nothing
else. transformers' models call their embeddings and stages, but also do other things. Nothing here changes a module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from ..models.freezing import state_of
from ..models.layer_changes import own_tensors
from ..models.plan import ChainPlan, Path, called_by, follow, settings_of, watch
from ..models.switches import ConvNextSwitches
from .confirm import calls_in_turn, confirm_chain
from .layer_kinds import Unfusable, check_forward


def find_chains(model: nn.Module, fused: Collection[int]) -> list[tuple[nn.Module, ChainPlan]]:
    """Each container of ``model``, with its plan; ``fused``: the ``id`` of each module that runs by a plan itself."""
    found: list[tuple[nn.Module, ChainPlan]] = []
    _collect(model, fused, found, {})
    return found


def _collect(
    module: nn.Module, fused: Collection[int], found: list[tuple[nn.Module, ChainPlan]], seen: dict[int, int | None]
) -> int | None:
    """How many fused modules a call of ``module`` runs one after another; None if it does anything else."""
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
    """The paths of a container's lists of modules that it calls."""
    found = []
    for name, child in container._modules.items():
        if isinstance(child, nn.ModuleList):
            found += [(*path, name), *_lists(child, (*path, name))]
    return found


def find_parts(model: nn.Module) -> list[tuple[nn.Module, ChainPlan]]:
    """The modules of ``model``, which is already fused, that call several of its parts and do other things, too.

    The outputs of the parts can be computed as one sequence before the module runs. ``model`` itself, whose class other
    code checks, and this package's own modules are left out.
    """
    return [] if isinstance(model, ConvNextSwitches) else [f for child in model.children() for f in _find_parts(child)]


def _find_parts(module: nn.Module) -> Iterator[tuple[nn.Module, ChainPlan]]:
    if state_of(module) is not None or isinstance(module, ConvNextSwitches):
        return
    parts = list(_parts(module))
    if len({path[0] for path in parts}) > 1 and calls_in_turn(module, [follow(module, path) for path in parts]):
        names, values = (tuple(setting[i] for setting in settings_of(module)) for i in range(2))
        yield module, ChainPlan(None, (), names, values, tuple(parts))
    else:
        for child in module.children():
            yield from _find_parts(child)


def _parts(module: nn.Module, path: Path = ()) -> Iterator[Path]:
    """The paths of the outermost fused modules in ``module``."""
    for name, child in module._modules.items():
        if child is not None:
            inner = *path, name
            yield from [inner] if state_of(child) is not None else _parts(child, inner)
