"""The modules of a model as steps, which run one after another without calling the modules."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..kernels.weights import BlockWeights, ConvNorm, NormConv


class Kind(enum.IntEnum):
    """What a step does."""

    STEM = 0
    DOWNSAMPLE = 1
    BLOCK = 2


WEIGHTS = {Kind.STEM: ConvNorm, Kind.DOWNSAMPLE: NormConv, Kind.BLOCK: BlockWeights}
"""The weights of a step of each kind."""


class Step(NamedTuple):
    """A stem, a downsampling layer or a block.

    Attributes:
        kind: which of the three.
        weights: the model's own parameters. A block's linear weights may also be those of 1×1 convolutions,
            (K, C, 1, 1), its γ may have any shape of C elements, and a global response norm's parameters any of K.
        eps: of the LayerNorm.
        act: of a block, one of ``config.ACTIVATIONS``.
        token: of a frozen module, a tensor that the folded weights are attached to; None for a stem.
        recompute: what a block's backward pass recomputes (see `ops.convnext_block`).
        draw: of a block with drop path, a function that draws the factor of each sample of its input, or returns None.
    """

    kind: Kind
    weights: ConvNorm | NormConv | BlockWeights
    eps: float
    act: str = ""
    token: Tensor | None = None
    recompute: int = 1
    draw: Callable[[Tensor], Tensor | None] | None = None


def shapes_after(steps: Iterable[Step], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """(N, H, W, C) after each step; ``shape``: before the first, (N, H, W, C), or (N, C, H, W) for a stem."""
    shapes = []
    for kind, weights, *_ in steps:
        if kind != Kind.BLOCK:
            shape = patched(shape, weights.weight.shape, stem=kind == Kind.STEM)
        shapes.append(tuple(shape))
    return shapes


def patched(shape: Sequence[int], size: Sequence[int], stem: bool) -> tuple[int, int, int, int]:
    """(N, H, W, C) after a convolution of patches by a weight of ``size`` (C', C, kh, kw)."""
    height, width = shape[2:] if stem else shape[1:3]
    return shape[0], height // size[2], width // size[3], size[0]
