"""A frozen block on a CPU in float32: what does not depend on the image is prepared once and kept with the weights.

One image keeps a processor busy for so short that what Python does around the calls shows in the time, and a library
that brings weights into its own layout on every call takes longer for that than for the image.
"""

from __future__ import annotations

import operator
import weakref
from typing import NamedTuple, Protocol

from torch import Tensor

from . import compiled, onednn_block

Weights = tuple[Tensor | None, ...]
"""Of `folding.FrozenBlock`."""


class Prepared(Protocol):
    """A block made ready: `aten.frozen_block_fwd` for x that `onednn.serves`, contiguous, of any size."""

    def __call__(self, x: Tensor, eps: float) -> Tensor:
        """(N, H, W, C) to the same, a new tensor."""


class _Kept(NamedTuple):
    made_of: Weights  # without w1
    act: str
    block: Prepared


_KEPT: dict[int, _Kept] = {}
"""By the ``id`` of w1, until w1 dies."""


def prepared(x: Tensor, weights: Weights, act: str) -> Prepared:
    """The block of these very weights, which must never change; sizes like those of the first x suit it best.

    Kernels of our own, where they serve (`compiled.prepare`), else oneDNN's.
    """
    dwconv_weight, dwconv_bias, w1, b1, w2, b2 = weights
    given = dwconv_weight, dwconv_bias, b1, w2, b2
    kept = _KEPT.get(id(w1))
    if kept is not None and kept.act == act and all(map(operator.is_, kept.made_of, given)):
        return kept.block
    if kept is None:
        weakref.finalize(w1, _KEPT.pop, id(w1), None)
    block = compiled.prepare(weights, act) or onednn_block.OnednnBlock(x, weights, act)
    _KEPT[id(w1)] = _Kept(given, act, block)
    return block
