"""Frozen modules on a CPU in float32: their weights are packed once for the kernels, and the packed weights live as
long as they do.

One image takes so little time that packing weights on every call would be noticeable.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ...kernels.weights import ConvNorm, FrozenBlock, FrozenDownsample
from . import llvm

Weights = tuple[Tensor | None, ...]
"""Of `weights.FrozenBlock` or `weights.FrozenDownsample`, or a stem's."""


class Prepared(Protocol):
    """A step with packed weights, for contiguous x (N, H, W, C), a stem's (N, C, H, W), that `onednn.serves`."""

    def __call__(self, x: Tensor, eps: float) -> Tensor:
        """A new tensor (N, H, W, C)."""
        raise NotImplementedError


class _Kept(NamedTuple):
    made_of: Weights  # except the one that is the key
    act: str
    step: Prepared


_KEPT: dict[int, _Kept] = {}
"""By the ``id`` of a weight, until it is freed."""


def _kept(weight: Tensor, others: Weights, act: str, make: Callable[[], Prepared | None]) -> Prepared | None:
    """The result of ``make`` for exactly these weights, which must never change."""
    kept = _KEPT.get(id(weight))
    if kept is not None and kept.act == act and all(map(operator.is_, kept.made_of, others)):
        return kept.step
    step = make()
    if step is not None:
        if kept is None:
            weakref.finalize(weight, _KEPT.pop, id(weight), None)
        _KEPT[id(weight)] = _Kept(others, act, step)
    return step


def prepared_block(weights: Weights, act: str) -> Prepared | None:
    """`ops.frozen_block_fwd` for these weights; None if not supported."""
    dwconv_weight, dwconv_bias, w1, b1, w2, b2 = weights
    others = dwconv_weight, dwconv_bias, b1, w2, b2
    return _kept(w1, others, act, lambda: llvm.prepare_block(weights, act))


def prepared_downsample(weight: Tensor, bias: Tensor) -> Prepared | None:
    """`ops.frozen_downsample_fwd` for these weights; None if not supported."""
    return _kept(weight, (bias,), "", lambda: llvm.prepare_downsample(weight, bias))


def kernels_for(
    steps: Sequence[ConvNorm | FrozenDownsample | FrozenBlock], acts: Sequence[str]
) -> list[llvm.Kernel] | None:
    """A stem's weights and those of frozen parts as kernels; None where one has none. ``acts``: of blocks."""
    kernels = []
    for weights, act in reversed(list(zip(steps, acts, strict=True))):  # a stem, whose kernel is not kept, last
        kernel = _kernel_for(weights, act)
        if kernel is None:
            return None
        kernels.append(kernel)
    return kernels[::-1]


def _kernel_for(weights: ConvNorm | FrozenDownsample | FrozenBlock, act: str) -> Prepared | None:
    if isinstance(weights, FrozenBlock):
        return prepared_block(weights, act)
    return prepared_downsample(*weights) if isinstance(weights, FrozenDownsample) else llvm.prepare_stem(*weights)
