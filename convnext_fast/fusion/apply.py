"""The fused ops in the models that people already have: ConvNeXts of transformers, timm, torchvision and others.

`fuse` gives each block, the stem and each downsampling layer a class of its own, a subclass of the host's with another
``forward`` (as FSDP2 does). Nothing else about the model changes: parameters, buffers, keys, hooks on blocks,
`isinstance`, class names. Each call reads the host's live parameters and first looks whether the module is still what
it was when it was fused; if not, it runs the host's own forward and warns.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.fused_module import Layered
from ..models.layer_changes import settings_of
from ..models.layers import ConvNextBlockBase
from .confirm import confirm
from .find_blocks import Plan, find_blocks, make_plan
from .find_patch_layers import PatchLayer, PatchPlan, find_patch_layers, make_patch_plan
from .forward import run
from .layer_kinds import Unfusable, changed, others_of, takes_keywords

_PLAN = "_convnext_fast_plan"


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did. Calling it calls the model, so that ``torch.compile(fuse(model))`` compiles that.

    Attributes:
        model: the model.
        fused: names of the blocks that run whole on the fused ops.
        partly_fused: names of the blocks whose depthwise convolution and LayerNorm do, and the rest by the host's own
            layers (ConvNeXt V2, whose global response norm stands between the linear layers).
        patch_layers: names of what does of the stem (convolution of patches, LayerNorm) and of the downsampling layers
            (LayerNorm, convolution of patches).
        left_alone: names of the other blocks and patch layers, and why.
    """

    model: nn.Module
    fused: tuple[str, ...]
    partly_fused: tuple[str, ...]
    patch_layers: tuple[str, ...]
    left_alone: dict[str, str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``."""
        return self.model(*args, **kwargs)

    def __str__(self) -> str:
        """The counts, then what was left alone, layers of one reason together."""
        counts = [
            (len(self.fused), "blocks"),
            (len(self.partly_fused), "blocks in part (depthwise convolution + LayerNorm)"),
            (len(self.patch_layers), "patch layers (stem, downsampling)"),
        ]
        done = sum(count for count, _ in counts)
        if not done and not self.left_alone:
            return f"{type(self.model).__name__}: no ConvNeXt block found"
        kinds = ", ".join(f"{count} {what}" for count, what in counts if count)
        lines = [f"{type(self.model).__name__}: {done} of {done + len(self.left_alone)} fused: {kinds or 'none'}"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            reasons.setdefault(reason, []).append(name or "the model itself")
        lines += [f"left alone: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, *, recompute: int | None = None, strict: bool = False) -> FuseReport:
    """Make the ConvNeXt blocks, the stem and the downsampling layers of ``model`` run on the fused ops, in place.

    Parameters, ``state_dict`` keys, optimisers, tied and frozen weights stay as they are, and so do copies, pickles
    (which need this package to load), autocast, checkpointing, and wrapping in DistributedDataParallel or with
    ``fully_shard`` afterwards. Blocks are recognised by what they hold and confirmed by running a copy, so that other
    implementations of the block are found too; so are the patch layers of a model that holds such blocks. Calling it
    again reports anew and changes ``recompute`` alone: a block to which something happened since (hooks inside, a layer
    replaced) runs its host's forward meanwhile and is reported as left alone. The model cannot be given to
    ``torch.jit.script`` before `unfuse`.

    Args:
        model: any module; blocks of ``transformers``, ``timm`` and ``torchvision`` ConvNeXts are known to be found.
        recompute: what the backward pass of the blocks computes anew instead of saving it, 0, 1 or 2 (see
            `ops.convnext_block`); None leaves it as it is, 1 at first. Without effect on blocks that are fused in part.
        strict: raise, before anything is changed, where a block or a patch layer is left alone or there is no block.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``recompute`` is not as above; with ``strict``, what the report would have said.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    if recompute not in (None, 0, 1, 2):
        raise ValueError(f"recompute is {recompute!r}: expected 0, 1 or 2, or None to leave it as it is")
    for module in model.modules():
        # A slice of a fused `torch.nn.Sequential` has its class, but is none.
        if isinstance(module, FusedForward) and _PLAN not in vars(module):
            module.__class__ = module._convnext_fast_host
    plans: list[tuple[nn.Module, Plan | PatchPlan | None]] = []
    left_alone: dict[str, str] = {}
    whole: list[str] = []
    partly: list[str] = []
    patches: list[str] = []
    blocks = dict(find_blocks(model))
    blocks.update(_own_blocks(model))
    patch_layers = find_patch_layers(model, blocks.values()) if blocks else []
    known: dict[Any, str | None] = {}
    found: list[tuple[str, nn.Module, PatchLayer | None]] = [(name, block, None) for name, block in blocks.items()]
    found += [(layer.name, layer.runner, layer) for layer in patch_layers]
    found += _unlike_before(model, [module for _, module, _ in found])
    for name, module, layer in found:
        try:
            plan = _plan_of(module, layer, known)
        except Unfusable as reason:
            left_alone[name] = str(reason)
            continue
        plans.append((module, plan))
        (patches if layer is not None else partly if plan is not None and plan.tail else whole).append(name)
    report = FuseReport(model, tuple(whole), tuple(partly), tuple(patches), left_alone)
    if strict and (left_alone or not blocks):
        raise ValueError(f"fuse with strict=True left the model as it was:\n{report}")
    for module, plan in plans:
        if recompute is not None and isinstance(plan, Plan):
            plan = plan._replace(recompute=recompute)
        if plan is not None:
            vars(module)[_PLAN] = plan
            if not isinstance(module, FusedForward):
                module.__class__ = fused_class(type(module))
        elif recompute is not None and isinstance(module, ConvNextBlockBase):
            module.recompute = recompute
    return report


def unfuse(model: nn.Module) -> None:
    """Give every module that `fuse` changed its own class back.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: another library gave a fused block a class on top of ours.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    fused = {name: module for name, module in model.named_modules() if isinstance(module, FusedForward)}
    for name, module in fused.items():
        if type(module) is not fused_class(module._convnext_fast_host):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(
                f"{name or 'the model'} was given the class {kind} after fuse(), which hides the one to put back: "
                "expected unfuse() before the model is wrapped"
            )
    for module in fused.values():
        module.__class__ = module._convnext_fast_host
        vars(module).pop(_PLAN, None)


class FusedForward:
    """What `fused_class` puts before a host's class."""

    _convnext_fast_host: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        return run(self, self.__dict__[_PLAN], x) if self._holds() else super().forward(x)

    def _holds(self) -> bool:
        """Whether the plan still fits; warns if not. Part of a fused `torch.nn.Sequential` has none, and needs none."""
        plan = self.__dict__.get(_PLAN)
        reason = None if plan is None else changed(self, plan)
        if reason is not None and not torch.compiler.is_compiling():
            kind = type(self).__name__
            warnings.warn(f"a fused {kind} runs its own forward: {reason} (see fuse)", RuntimeWarning, stacklevel=3)
        return plan is not None and reason is None

    def extra_repr(self) -> str:
        """The host's, and that the module is fused."""
        words = super().extra_repr(), "fused by convnext_fast"
        return ", ".join(filter(None, words))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the host's class, for ours has no name to import it by."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if type(self) is not fused_class(self._convnext_fast_host):
            return reduced
        return _new, (self._convnext_fast_host,), *reduced[2:]


class FusedForwardWithKeywords(FusedForward):
    """`FusedForward` for a host that takes any keyword and reads none, as the stages of transformers' DINOv3."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        return run(self, self.__dict__[_PLAN], x) if self._holds() else super(FusedForward, self).forward(x, **kwargs)


@functools.cache
def fused_class(host: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a host's class that runs the fused ops; it goes by the host's name."""
    forward = FusedForwardWithKeywords if takes_keywords(host.forward) else FusedForward
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {**{name: getattr(host, name) for name in names}, "_convnext_fast_host": host}
    return type(host.__name__, (forward, host), namespace)


def _new(host: type[nn.Module]) -> nn.Module:
    """A fused module without its state."""
    kind = fused_class(host)
    return kind.__new__(kind)


def _own_blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {name: block for name, block in model.named_modules() if isinstance(block, ConvNextBlockBase)}


def _unlike_before(model: nn.Module, found: list[nn.Module]) -> list[tuple[str, nn.Module, PatchLayer | None]]:
    """The fused modules of ``model``, and this package's own, that do not look like blocks or patch layers any more."""
    seen = {id(module) for module in found}
    others = []
    for name, module in model.named_modules():
        plan = vars(module).get(_PLAN)
        if plan is not None and id(module) not in seen:
            path = () if plan.pair is None else plan.pair[0]
            layer = None if plan.pair is None else PatchLayer(".".join(filter(None, (name, *path))), module, path)
            others.append((name if layer is None else layer.name, module, layer))
        elif isinstance(module, Layered) and id(module) not in seen and module.change() is not None:
            others.append((name, module, PatchLayer(name, module, ())))
    return others


def _plan_of(module: nn.Module, layer: PatchLayer | None, known: dict[Any, str | None]) -> Plan | PatchPlan | None:
    """The plan of a block, or of the module that runs a patch layer; None for this package's own.

    Raises:
        Unfusable: it is to be left alone.
    """
    if type(module).__module__.split(".")[0] == __name__.split(".")[0] or isinstance(module, ConvNextBlockBase):
        if not module.fused:
            raise Unfusable("it is this package's own, with fused=False")
        reason = module.change()
        if reason is not None:
            raise Unfusable(reason)
        return None
    if _PLAN in vars(module):
        plan = vars(module)[_PLAN]
        if layer is not None and plan.pair[0] != layer.path:
            raise Unfusable(f"the {type(module).__name__} that runs it runs another patch layer already")
        reason = changed(module, plan)
        if reason is not None:
            raise Unfusable(reason)
        return plan
    plan = make_plan(module) if layer is None else make_patch_plan(layer)
    # Modules alike in everything but their weights and their rate of stochastic depth are run once.
    alike = (type(module), settings_of(module), others_of(module, [layer.path for layer in plan.watched]), plan)
    if alike not in known:
        try:
            confirm(module, plan)
            known[alike] = None
        except Unfusable as reason:
            known[alike] = str(reason)
    if known[alike] is not None:
        raise Unfusable(known[alike])
    return plan


__all__ = ["FuseReport", "fuse", "unfuse"]
