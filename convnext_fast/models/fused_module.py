"""Modules of this package that compute with the weights of their layers, and call the layers where they must.

With ``fused`` set, a block, the stem or a downsampling layer reads its layers' weights and calls none of them. Users
replace such layers (adapters, quantisation, a dilated convolution) and hang hooks on them: then the module calls them
one after another, as it does with ``fused=False``, and says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .layer_changes import Path, Records, change, follow, recall, remember, watch

_LIVE = ("eps", "rate", "act_name")
"""Settings that every forward reads anew."""


class Layered(nn.Module):
    """A module that may call its layers or only read their weights.

    Attributes:
        fused: run the fused ops; otherwise call the layers.
    """

    fused: bool
    _records = Records()
    _number = remember(Records())

    def watch(self, weighted: Iterable[Path], others: Iterable[Path] = ()) -> None:
        """Remember the layers as they are: those whose weights are read, and those that are only not called."""
        weighted = tuple(weighted)
        watched = tuple(watch(path, follow(self, path), *_LIVE) for path in (*weighted, *others))
        self._records = Records(watched, weighted)
        self._number = remember(self._records)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = remember(self._records)

    def change(self, reads: bool = True) -> str | None:
        """Why the layers must be called, whatever ``fused`` says; None where there is no reason.

        ``reads``: whether the weights are read, and not copies of them.
        """
        return change(self, *self._recalled(), reads)

    def _recalled(self) -> Records:
        return recall(self._number) if torch.compiler.is_compiling() else self._records

    def reads_weights(self) -> bool:
        """Whether the fused ops run; warns where the layers are called though ``fused`` is set."""
        if not self.fused:
            return False
        reason = self.change()
        if reason is not None and not torch.compiler.is_compiling():
            kind = type(self).__name__
            warnings.warn(f"a fused {kind} calls its layers one by one: {reason}", RuntimeWarning, stacklevel=3)
        return reason is None

    def stands(self, frozen: Any) -> bool:
        """Whether a step by ``frozen`` copies of the weights, or by the weights, does what a call does."""
        if not self.fused or self.learns():
            return False
        # A compiler would guard every weight that is looked at.
        return self.change(reads=frozen is None or not torch.compiler.is_compiling()) is None

    def learns(self) -> bool:
        """Whether autograd records and a parameter whose values are read wants a gradient."""
        if not torch.is_grad_enabled():
            return False
        holders = (self, *(follow(self, path) for path in self._recalled().weighted))
        return any(p is not None and p.requires_grad for holder in holders for p in holder._parameters.values())


class Pair(Layered, nn.Sequential):
    """A convolution of patches and a LayerNorm, in either order."""

    def __init__(self, first: nn.Module, second: nn.Module, fused: bool):
        super().__init__(first, second)
        self.fused = fused
        self.watch((("0",), ("1",)))

    def change(self, reads: bool = True) -> str | None:
        """As `Layered.change`."""
        if len(self._modules) != 2:
            return f"it holds {len(self._modules)} layers, not 2"
        return super().change(reads)


def layer_norm_2d(x: Tensor, norm: nn.Module) -> Tensor:
    """LayerNorm over the channels of (N, C, H, W)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def in_turn(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """x (N, C, H, W) through ``layers``, each of which takes and returns such, but a LayerNorm over the channels."""
    for layer in layers:
        x = layer_norm_2d(x, layer) if _is_over_channels_last(layer) else layer(x)
    return x


def outputs_in_turn(modules: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """What comes out of each of ``modules``, the first of which takes x and each other what came out before."""
    outputs = []
    for module in modules:
        x = module(x)
        outputs.append(x)
    return outputs


def _is_over_channels_last(layer: nn.Module) -> bool:
    """Whether ``layer`` is PyTorch's own LayerNorm, or wraps one (as adapters and FullyShardedDataParallel do)."""
    while type(layer).forward is not nn.LayerNorm.forward:
        inner = getattr(layer, "original_module", None)
        children = list(layer.children()) if inner is None else [inner]
        if len(children) != 1:
            return False
        layer = children[0]
    return True
