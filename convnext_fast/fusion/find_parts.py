"""Recognise the modules of a fused model that call several of its parts one after another and do other things, too.

Such is a model of transformers, whose embeddings and stages are parts of it. The outputs of the parts can be computed
as one sequence before the module runs. Nothing here changes a module.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..models.freezing import state_of
from ..models.plan import ChainPlan, Path, follow, settings_of
from ..models.switches import ConvNextSwitches
from .confirm import calls_in_turn


def find_parts(model: nn.Module) -> list[tuple[nn.Module, ChainPlan]]:
    """The modules in ``model``, which is fused already, with their plans.

    ``model`` itself stays as it is, for its class is what other code looks at, and so do this package's own.
    """
    return [] if isinstance(model, ConvNextSwitches) else [f for child in model.children() for f in _find(child)]


def _find(module: nn.Module) -> Iterator[tuple[nn.Module, ChainPlan]]:
    if state_of(module) is not None or isinstance(module, ConvNextSwitches):
        return
    parts = list(_parts(module))
    if len({path[0] for path in parts}) > 1 and calls_in_turn(module, [follow(module, path) for path in parts]):
        names, values = (tuple(setting[i] for setting in settings_of(module)) for i in range(2))
        yield module, ChainPlan(None, (), names, values, tuple(parts))
    else:
        for child in module.children():
            yield from _find(child)


def _parts(module: nn.Module, path: Path = ()) -> Iterator[Path]:
    """Where the outermost fused modules in ``module`` are."""
    for name, child in module._modules.items():
        if child is not None:
            inner = *path, name
            yield from [inner] if state_of(child) is not None else _parts(child, inner)
