"""The parameters of a block, the stem and a downsampling layer, as the modules pass them to the launchers.

C channels, K hidden units, k the side of the depthwise convolution. Any floating dtype and strides.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

GRN_EPS = 1e-6
"""What every ConvNeXt V2 adds to the mean of the norms that its global response norm divides by."""


class MlpWeights(NamedTuple):
    """The pointwise MLP: w1 (K, C), b1 (K,), w2 (C, K), b2 (C,), and the layer scale gamma (C,) or None."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    gamma: Tensor | None


class ConvNorm(NamedTuple):
    """A convolution, then LayerNorm: the stem, or the depthwise convolution of a block.

    weight: (C', C, kh, kw), or (C, 1, k, k) of a depthwise one; bias (C',) or None; ln_weight, ln_bias (C',).
    """

    weight: Tensor
    bias: Tensor | None
    ln_weight: Tensor
    ln_bias: Tensor


class NormConv(NamedTuple):
    """LayerNorm, then a convolution of patches: a downsampling layer; shapes as in `ConvNorm`, ln_*: (C,)."""

    ln_weight: Tensor
    ln_bias: Tensor
    weight: Tensor
    bias: Tensor | None


class BlockWeights(NamedTuple):
    """A block: dwconv_weight (C, 1, k, k), dwconv_bias (C,) or None, LayerNorm's affine (C,), and `MlpWeights`.

    ln_weight and ln_bias are None where they are folded into w1 and b1, dwconv_weight where the MLP runs alone.
    grn_weight and grn_bias (K,): of a ConvNeXt V2 block's global response norm; None for V1, which has none.
    """

    dwconv_weight: Tensor | None
    dwconv_bias: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    gamma: Tensor | None
    grn_weight: Tensor | None = None
    grn_bias: Tensor | None = None

    def mlp(self) -> MlpWeights:
        """The linear layers and γ; neither a property nor a slice, which PyTorch 2.9 does not compile here."""
        return MlpWeights(self.w1, self.b1, self.w2, self.b2, self.gamma)


class FrozenBlock(NamedTuple):
    """A block whose LayerNorm and layer scale are folded into its linear layers (`convnext_fast.ops.folding`).

    dwconv_weight: (C, 1, k, k) and dwconv_bias: (C,) or None; w1: (K, C) and w2: (C, K) in the compute dtype; b1:
    (2, K), the bias and the row sums of w1, by which a GEMM normalises in its epilogue, and b2: (C,), both in at least
    float32. grn_weight: (K,) of a V2 block, whose grn_bias is folded into b2; None for V1.
    """

    dwconv_weight: Tensor
    dwconv_bias: Tensor | None
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    grn_weight: Tensor | None = None


class FrozenDownsample(NamedTuple):
    """A downsampling layer whose LayerNorm is folded into its convolution.

    weight: (C', C, kh, kw), channels_last, in the compute dtype; bias: (C',) in at least float32.
    """

    weight: Tensor
    bias: Tensor


class Saved(NamedTuple):
    """What a block keeps for its backward pass.

    u: the convolution's output, statistics: LayerNorm's of it, a: the hidden units before the activation, norms: those
    of the hidden units over each sample's pixels, by which GRN divides. Absent ones are recomputed, and V1 has no
    norms. Shapes and dtypes are the backend's own.
    """

    u: Tensor | None
    statistics: Tensor | None
    a: Tensor | None
    norms: Tensor | None = None
