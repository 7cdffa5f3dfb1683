"""Frozen modules on a CPU in float32: what does not depend on the image is prepared once and kept with the weights.

One image keeps a processor busy for so short that what Python does around the calls shows in the time, and a library
that brings weights into its own layout on every call takes longer for that than for the image.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ...models.steps import BLOCK, DOWNSAMPLE
from . import llvm, onednn_block

Weights = tuple[Tensor | None, ...]
"""Of `folding.FrozenBlock` or `folding.FrozenDownsample`, or a stem's."""


class Prepared(Protocol):
    """A step made ready, for x (N, H, W, C), a stem's (N, C, H, W), that `onednn.serves`, contiguous, of any size."""

    def __call__(self, x: Tensor, eps: float) -> Tensor:
        """A new tensor (N, H, W, C)."""
        raise NotImplementedError


class _Kept(NamedTuple):
    made_of: Weights  # without the one that it is kept with
    act: str
    step: Prepared


_KEPT: dict[int, _Kept] = {}
"""By the ``id`` of a weight, until that dies."""


def _kept(weight: Tensor, others: Weights, act: str, make: Callable[[], Prepared | None]) -> Prepared | None:
    """What ``make`` makes of these very weights, which must never change."""
    kept = _KEPT.get(id(weight))
    if kept is not None and kept.act == act and all(map(operator.is_, kept.made_of, others)):
        return kept.step
    step = make()
    if step is not None:
        if kept is None:
            weakref.finalize(weight, _KEPT.pop, id(weight), None)
        _KEPT[id(weight)] = _Kept(others, act, step)
    return step


def prepared_block(weights: Weights, act: str, shape: Sequence[int]) -> Prepared:
    """`aten.frozen_block_fwd` for these weights; sizes like the first ``shape`` suit it best.

    A kernel of our own, where it serves (`compiled.prepare_block`), else oneDNN's.
    """
    dwconv_weight, dwconv_bias, w1, b1, w2, b2 = weights
    return _kept(
        w1,
        (dwconv_weight, dwconv_bias, b1, w2, b2),
        act,
        lambda: llvm.prepare_block(weights, act) or onednn_block.OnednnBlock(shape, weights, act),
    )


def prepared_downsample(weight: Tensor, bias: Tensor) -> Prepared | None:
    """`aten.frozen_downsample_fwd` for these weights; None where no kernel of our own serves."""
    return _kept(weight, (bias,), "", lambda: llvm.prepare_downsample(weight, bias))


def kernels_for(
    steps: Sequence[Weights], acts: Sequence[str], shapes: Sequence[Sequence[int]]
) -> list[llvm.Kernel] | None:
    """Steps of `steps` as kernels of our own; None where one has none. ``shapes``: before each step."""
    kernels = []
    for weights, act, shape in reversed(list(zip(steps, acts, shapes, strict=True))):  # a stem, never kept, last
        kernel = _kernel_for(weights, act, shape)
        if not isinstance(kernel, llvm.Kernel):
            return None
        kernels.append(kernel)
    return kernels[::-1]


def _kernel_for(weights: Weights, act: str, shape: Sequence[int]) -> Prepared | None:
    if len(weights) == BLOCK:
        return prepared_block(weights, act, shape)
    return prepared_downsample(*weights) if len(weights) == DOWNSAMPLE else llvm.prepare_stem(*weights)
