"""LayerNorm's affine and the layer scale folded into the linear layers, for inference.

With n = x̂·g + β and z scaled by γ, for x̂ the normalised activations:

    fc1(n) = x̂·(w1∘g)ᵀ + (b1 + w1·β)             γ·fc2(h) = h·(γ∘w2)ᵀ + γ·b2
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Folded(NamedTuple):
    """Linear layers that hold LayerNorm's affine and the layer scale.

    w1: (K, C) and w2: (C, K) in the compute dtype; b1: (K,) and b2: (C,) in at least float32.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def fold(
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    dtype: torch.dtype,
) -> Folded:
    """Fold in at least float32, round once to ``dtype``. None for LayerNorm's affine or γ means the identity."""
    wide = torch.promote_types(dtype, torch.float32)
    w1, b1, w2, b2 = w1.to(wide), b1.to(wide), w2.to(wide), b2.to(wide)
    if ln_bias is not None:
        b1 = torch.addmv(b1, w1, ln_bias.to(wide))
    if ln_weight is not None:
        w1 = w1 * ln_weight.to(wide)
    if gamma is not None:
        gamma = gamma.to(wide)
        w2, b2 = w2 * gamma[:, None], b2 * gamma
    return Folded(w1.to(dtype), b1, w2.to(dtype), b2)


class FrozenBlock(NamedTuple):
    """What a block without gradients computes with: `Folded`, and what a GEMM needs to normalise in its epilogue.

    dwconv_weight: (C, 1, k, k) and dwconv_bias: (C,) or None, copies; w1: (K, C) and w2: (C, K) in the compute dtype;
    b1: (2, K), the bias and the row sums of w1, and b2: (C,), both in at least float32.
    """

    dwconv_weight: Tensor
    dwconv_bias: Tensor | None
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class FrozenDownsample(NamedTuple):
    """The downsampling convolution that holds its LayerNorm's affine.

    weight: (C', C, kh, kw), channels_last, in the compute dtype; bias: (C',) in at least float32.
    """

    weight: Tensor
    bias: Tensor


def freeze_block(
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
) -> FrozenBlock:
    """The parameters of a block folded for the dtype of ``w1``. The row sums are those of the rounded weights."""
    folded = fold(ln_weight, ln_bias, w1, b1, w2, b2, gamma, w1.dtype)
    row_sums = folded.w1.sum(1, dtype=folded.b1.dtype)
    dwconv = dwconv_weight.clone(), None if dwconv_bias is None else dwconv_bias.clone()
    return FrozenBlock(*dwconv, folded.w1, torch.stack((folded.b1, row_sums)), folded.w2.clone(), folded.b2.clone())


def freeze_downsample(ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None) -> FrozenDownsample:
    """LayerNorm's affine folded into a patch convolution, weight (C', C, kh, kw), for the dtype of ``weight``."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    taps = weight.to(wide)
    shift = (taps * ln_bias.to(wide)[:, None, None]).sum((1, 2, 3))
    folded = (taps * ln_weight.to(wide)[:, None, None]).to(weight.dtype, memory_format=torch.channels_last)
    return FrozenDownsample(folded, shift if bias is None else shift + bias.to(wide))
