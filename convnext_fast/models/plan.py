"""Plans: where the layers of a block, a patch layer or a container are, so that ops can replace its forward.

A plan is plain data about a module: paths to its layers, and what these layers were like when the plan was made. This
package's own modules declare theirs, and `fuse` makes one for each module of another library that it recognises.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

Path = tuple[str, ...]
"""Attribute names that lead from a module to a layer in it."""


class Watched(NamedTuple):
    """A layer that the fused forward does not call, as it was when the plan was made.

    Attributes:
        path: where it is.
        kind: its class.
        names, values: its plain attributes, such as a convolution's stride.
        children: names of the modules in it.
        biased: whether it has a bias (see `is_biased`).
    """

    path: Path
    kind: type
    names: tuple[str, ...]
    values: tuple[Any, ...]
    children: tuple[str, ...]
    biased: bool


class BlockPlan(NamedTuple):
    """Where the layers of a ConvNeXt block are.

    Attributes:
        dwconv, norm, fc1, fc2: the layers.
        gamma: name of the block's layer scale, or None.
        drop_path: its stochastic depth, or None.
        rate: name of the stochastic depth's attribute that holds its rate.
        act: one of ``config.ACTIVATIONS``.
        watched: the layers that are not called, to notice when they change.
        grn: the global response norm of ConvNeXt V2, or None.
        grn_names: names of its two parameters.
        recompute: what the backward pass recomputes (see `ops.convnext_block`).
        fused: whether the plan is used at all.
        own: whether the block is this package's own: its forward reads γ on every call, and no other tensor of its own.
    """

    dwconv: Path
    norm: Path
    fc1: Path
    fc2: Path
    gamma: str | None
    drop_path: Path | None
    rate: str
    act: str
    watched: tuple[Watched, ...]
    grn: Path | None = None
    grn_names: tuple[str, ...] = ()
    recompute: int = 1
    fused: bool = True
    own: bool = False


class PatchPlan(NamedTuple):
    """Where the two layers of a patch layer (the stem, or a downsampling layer) are.

    Attributes:
        norm, conv: the layers. The module that holds them holds nothing else.
        stem: whether the convolution comes first.
        watched: the layers that are not called, to notice when they change.
        following: a list of modules that the module calls after the two layers; None if it calls nothing else.
        fused: whether the plan is used at all.
    """

    norm: Path
    conv: Path
    stem: bool
    watched: tuple[Watched, ...]
    following: Path | None = None
    fused: bool = True


class ChainPlan(NamedTuple):
    """A container that calls its child modules one after another, and does nothing else.

    It calls the modules in a list, not the list. With ``parts`` it does other things, too, as transformers' models do.

    Attributes:
        children: names of its child modules; None if these may change, as in a `torch.nn.Sequential`.
        watched: the lists in it, which are not called.
        names, values: plain attributes of the container.
        parts: for a container that does other things, too: the modules, at any depth, that it calls one after another.
        fused: whether the plan is used at all.
    """

    children: tuple[str, ...] | None = None
    watched: tuple[Watched, ...] = ()
    names: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()
    parts: tuple[Path, ...] = ()
    fused: bool = True


Plan = BlockPlan | PatchPlan | ChainPlan


_PLANS: list[Plan] = []
_KEYS: dict[Plan, str] = {}
_LOCK = threading.Lock()


def remember(plan: Plan) -> str:
    """A key that stands for this plan in this process; equal plans have the same key."""
    with _LOCK:
        if plan not in _KEYS:
            _PLANS.append(plan)
            _KEYS[plan] = str(len(_PLANS) - 1)
        return _KEYS[plan]


def recall(key: str) -> Plan:
    """The plan that a key stands for.

    A compiler takes the plan as a constant and guards only the key: a guard for each field of a plan would take as long
    as a kernel.
    """
    return _PLANS[int(key)]


recall._dynamo_marked_constant = True  # as `torch.compiler.assume_constant_result`, which takes a second to import


def watch(module: nn.Module, path: Path, *skip: str) -> Watched:
    """The layer at ``path`` as it is now; ``skip``: settings that may change."""
    layer = follow(module, path)
    settings = settings_of(layer, *skip)
    names, values = (tuple(setting[i] for setting in settings) for i in range(2))
    return Watched(path, type(layer), names, values, tuple(layer._modules), is_biased(layer))


def follow(module: nn.Module, path: Path) -> Any:
    """The layer at ``path``; None where there is none."""
    layer: Any = module
    for name in path:
        layer = None if layer is None else layer._modules.get(name)
    return layer


def called_by(container: nn.Module) -> Iterator[nn.Module]:
    """The modules that a container with a `ChainPlan` calls, in order."""
    for child in container._modules.values():
        if isinstance(child, nn.ModuleList):
            yield from called_by(child)
        elif child is not None:
            yield child


def settings_of(module: nn.Module, *skip: str) -> tuple[tuple[str, Any], ...]:
    """The plain attributes of ``module`` except ``training``, private ones and ``skip``."""
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in ("training", *skip) and is_setting(value)
    )


def weights_of(plan: BlockPlan | PatchPlan) -> list[tuple[Path, str]]:
    """The layers, except the norm, whose weights the fused ops read, each with the name of a weight.

    Biases are left out. A global response norm is there twice, once for each of its two parameters.
    """
    if isinstance(plan, PatchPlan):
        return [(plan.conv, "weight")]
    linear = [(path, "weight") for path in (plan.dwconv, plan.fc1, plan.fc2)]
    return linear + [(plan.grn, name) for name in plan.grn_names if plan.grn is not None]


def calls_others(plan: Plan) -> bool:
    """Whether the module is more than one block or patch layer."""
    return isinstance(plan, ChainPlan) or (isinstance(plan, PatchPlan) and plan.following is not None)


def holder_of(plan: PatchPlan) -> Path:
    """Where the module that holds the pair of layers is."""
    return plan.norm[:-1]


def is_setting(value: Any) -> bool:
    """Whether an attribute is plain data."""
    if isinstance(value, tuple):
        return all(is_setting(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def is_biased(layer: nn.Module) -> bool:
    """Whether a layer has a bias. True if it has no such name: FullyShardedDataParallel removes parameters' names."""
    return layer._parameters.get("bias", "elsewhere") is not None
