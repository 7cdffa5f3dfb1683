"""The fused ops in the models that people already have: ConvNeXts of transformers, timm, torchvision and others.

`fuse` gives each block a class of its own, a subclass of the host's with another ``forward`` (as FSDP2 does). Nothing
else about the model changes: parameters, buffers, keys, hooks on blocks, `isinstance`, class names. Each call reads the
host's live parameters and first looks whether the block is still what it was when it was fused; if not, it runs the
host's own forward and warns.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .block import ConvNextBlockBase
from .fuse_forward import run
from .fuse_hosts import Plan, Unfusable, changed, find_blocks, make_plan, settings_of
from .fuse_probe import confirm

_PLAN = "_convnext_fast_plan"


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did. Calling it calls the model, so that ``torch.compile(fuse(model))`` compiles that.

    Attributes:
        model: the model.
        fused: names of the blocks that run whole on the fused ops.
        partly_fused: names of the blocks whose depthwise convolution and LayerNorm do, and the rest by the host's own
            layers (ConvNeXt V2, whose global response norm stands between the linear layers).
        left_alone: names of the other blocks, and why.
    """

    model: nn.Module
    fused: tuple[str, ...]
    partly_fused: tuple[str, ...]
    left_alone: dict[str, str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``."""
        return self.model(*args, **kwargs)

    def __str__(self) -> str:
        """The counts, then the blocks left alone, those of one reason together."""
        total = len(self.fused) + len(self.partly_fused) + len(self.left_alone)
        if not total:
            return f"{type(self.model).__name__}: no ConvNeXt block found"
        lines = [f"{type(self.model).__name__}: {len(self.fused)} of {total} blocks fused"]
        if self.partly_fused:
            lines.append(f"{len(self.partly_fused)} in part (depthwise convolution + LayerNorm)")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            reasons.setdefault(reason, []).append(name or "the model itself")
        lines += [f"left alone: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, *, strict: bool = False) -> FuseReport:
    """Make the ConvNeXt blocks of ``model`` run on the fused ops, in place.

    Parameters, ``state_dict`` keys, optimisers, tied and frozen weights stay as they are, and so do copies, pickles
    (which need this package to load), autocast, checkpointing, and wrapping in DistributedDataParallel or with
    ``fully_shard`` afterwards. Blocks are recognised by what they hold and confirmed by running a copy, so that other
    implementations of the block are found too. Calling it again changes nothing and reports anew: a block to which
    something happened since (hooks inside, a layer replaced) runs its host's forward meanwhile and is reported as left
    alone. The model cannot be given to ``torch.jit.script`` before `unfuse`.

    Args:
        model: any module; blocks of ``transformers``, ``timm`` and ``torchvision`` ConvNeXts are known to be found.
        strict: raise, before anything is changed, where a block is left alone or there is none.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: with ``strict``, what the report would have said.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    plans: dict[str, Plan] = {}
    left_alone: dict[str, str] = {}
    whole: list[str] = []
    partly: list[str] = []
    blocks = dict(find_blocks(model))
    blocks.update(_own_blocks(model))
    known: dict[Any, str | None] = {}
    for name, block in blocks.items():
        try:
            plan = _plan_of(block, known)
        except Unfusable as reason:
            left_alone[name] = str(reason)
            continue
        (partly if plan is not None and plan.tail else whole).append(name)
        if plan is not None and not isinstance(block, FusedForward):
            plans[name] = plan
    report = FuseReport(model, tuple(whole), tuple(partly), left_alone)
    if strict and (left_alone or not blocks):
        raise ValueError(f"fuse with strict=True left the model as it was:\n{report}")
    for name, plan in plans.items():
        blocks[name].__dict__[_PLAN] = plan
        blocks[name].__class__ = fused_class(type(blocks[name]))
    return report


def unfuse(model: nn.Module) -> None:
    """Give every block that `fuse` changed its own class back.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: another library gave a fused block a class on top of ours.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, FusedForward)}
    for name, block in blocks.items():
        if type(block) is not fused_class(block._convnext_fast_host):
            kind = f"{type(block).__module__}.{type(block).__qualname__}"
            raise ValueError(
                f"{name or 'the model'} was given the class {kind} after fuse(), which hides the one to put back: "
                "expected unfuse() before the model is wrapped"
            )
    for block in blocks.values():
        block.__class__ = block._convnext_fast_host
        del block.__dict__[_PLAN]


class FusedForward:
    """What `fused_class` puts before a host's class."""

    _convnext_fast_host: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        plan = self.__dict__[_PLAN]
        reason = changed(self, plan)
        if reason is None:
            return run(self, plan, x)
        if not torch.compiler.is_compiling():
            kind = type(self).__name__
            warnings.warn(f"a fused {kind} runs its own forward: {reason} (see fuse)", RuntimeWarning, stacklevel=2)
        return super().forward(x)

    def extra_repr(self) -> str:
        """The host's, and that the block is fused."""
        words = super().extra_repr(), "fused by convnext_fast"
        return ", ".join(filter(None, words))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the host's class, for ours has no name to import it by."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if type(self) is not fused_class(self._convnext_fast_host):
            return reduced
        return _new, (self._convnext_fast_host,), *reduced[2:]


@functools.cache
def fused_class(host: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a host's block class that runs the fused ops; it goes by the host's name."""
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {**{name: getattr(host, name) for name in names}, "_convnext_fast_host": host}
    return type(host.__name__, (FusedForward, host), namespace)


def _new(host: type[nn.Module]) -> nn.Module:
    """A fused block without its state."""
    kind = fused_class(host)
    return kind.__new__(kind)


def _own_blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {name: block for name, block in model.named_modules() if isinstance(block, ConvNextBlockBase)}


def _plan_of(block: nn.Module, known: dict[Any, str | None]) -> Plan | None:
    """The plan of a block; None for this package's own.

    Raises:
        Unfusable: it is to be left alone.
    """
    if isinstance(block, ConvNextBlockBase):
        if not block.fused:
            raise Unfusable("it is this package's own, with fused=False")
        return None
    if isinstance(block, FusedForward):
        plan = block.__dict__[_PLAN]
        reason = changed(block, plan)
        if reason is not None:
            raise Unfusable(reason)
        return plan
    plan = make_plan(block)
    # Blocks alike in everything but their weights and their rate of stochastic depth are run once.
    alike = (type(block), settings_of(block), plan)
    if alike not in known:
        try:
            confirm(block, plan)
            known[alike] = None
        except Unfusable as reason:
            known[alike] = str(reason)
    if known[alike] is not None:
        raise Unfusable(known[alike])
    return plan


__all__ = ["FuseReport", "fuse", "unfuse"]
