"""LayerNorm's affine and the layer scale folded into the linear layers, for inference.

With n = x̂·g + β and z scaled by γ, for x̂ the normalised activations:

    fc1(n) = x̂·(w1∘g)ᵀ + (b1 + w1·β)             γ·fc2(h) = h·(γ∘w2)ᵀ + γ·b2

The bias of a global response norm, which is added to h, becomes part of b2: fc2(h + bias) = h·w2ᵀ + (b2 + w2·bias).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.weights import FrozenBlock, FrozenDownsample


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
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
) -> FrozenBlock:
    """The parameters of a block, folded in at least float32 and rounded once to the dtype of ``w1``.

    The row sums of ``w1`` are those of the rounded weights.
    """
    dtype, wide = w1.dtype, torch.promote_types(w1.dtype, torch.float32)
    w1, b1, w2, b2 = w1.to(wide), b1.to(wide), w2.to(wide), b2.to(wide)
    b1 = torch.addmv(b1, w1, ln_bias.to(wide))
    w1 = (w1 * ln_weight.to(wide)).to(dtype)
    if grn_bias is not None:
        b2 = torch.addmv(b2, w2, grn_bias.to(wide))
    if gamma is not None:
        w2, b2 = w2 * gamma.to(wide)[:, None], b2 * gamma.to(wide)
    b1 = torch.stack((b1, w1.sum(1, dtype=wide)))
    dwconv_bias = None if dwconv_bias is None else dwconv_bias.clone()
    grn_weight = None if grn_weight is None else grn_weight.clone()
    return FrozenBlock(dwconv_weight.clone(), dwconv_bias, w1, b1, w2.to(dtype, copy=True), b2.clone(), grn_weight)


def freeze_downsample(ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None) -> FrozenDownsample:
    """LayerNorm's affine folded into a patch convolution, weight (C', C, kh, kw), which keeps its dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    taps = weight.to(wide)
    shift = (taps * ln_bias.to(wide)[:, None, None]).sum((1, 2, 3))
    folded = (taps * ln_weight.to(wide)[:, None, None]).to(weight.dtype, memory_format=torch.channels_last)
    return FrozenDownsample(folded, shift if bias is None else shift + bias.to(wide))
