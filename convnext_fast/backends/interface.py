"""What a backend computes: the fused ops, forward and backward, on checked arguments and outside autograd.

x, y and their gradients are (N, H, W, C), contiguous, in the dtype R of the residual stream. ``dtype`` is the compute
dtype T. eps is LayerNorm's, act one of ``config.ACTIVATIONS``, drop_scale (N,) or None the drop-path factor of each
sample. Gradients are returned in order, that of x first, then those of the weights, each in the dtype and shape of its
input; None where there is no such input.
`gpu` and `cpu.ops` are modules with these functions (a CPU has no `patchify_stem_bwd`: there the reference runs);
`convnext_fast.ops` calls them and registers each as an operator ``convnext_fast::<name>``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.weights import BlockWeights, ConvNorm, FrozenBlock, FrozenDownsample, MlpWeights, NormConv, Saved

Gradients = tuple[Tensor | None, ...]


def like_inputs(grads: Iterable[Tensor | None], x: Tensor, weights: Iterable[Tensor | None]) -> Gradients:
    """The gradients of x and of the weights in the dtypes and shapes of these inputs."""
    return tuple(map(_like, grads, (x, *weights)))


def _like(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    if grad is None or like is None or (grad.dtype == like.dtype and grad.shape == like.shape):
        return grad if like is not None else None
    return grad.to(like.dtype).reshape(like.shape)


class Backend(Protocol):
    """The functions of a backend."""

    def block_fwd(
        self,
        x: Tensor,
        weights: BlockWeights,
        drop_scale: Tensor | None,
        eps: float,
        act: str,
        recompute: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y, then the four fields of `Saved`: ``a`` at level 0 of ``recompute``; u, statistics and norms below level 2.

        x and y are in R, but on a GPU x may be narrower than γ, and so than y.
        """

    def block_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        saved: Saved,
        weights: BlockWeights,
        drop_scale: Tensor | None,
        eps: float,
        act: str,
        dtype: torch.dtype,
        needs_x: bool,
        needs_dwconv: bool,
    ) -> list[Tensor]:
        """Gradients of x and of the weights."""

    def frozen_block_fwd(self, x: Tensor, weights: FrozenBlock, eps: float, act: str, dtype: torch.dtype) -> Tensor:
        """The block on folded weights."""

    def dwconv_layernorm_fwd(
        self, x: Tensor, weights: ConvNorm, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """LayerNorm(u) in T, then what is saved: u = dwconv(x) (N, H, W, C) in T, and its LayerNorm statistics."""

    def dwconv_layernorm_bwd(
        self, dn: Tensor, x: Tensor, u: Tensor, statistics: Tensor, weights: ConvNorm, eps: float, dtype: torch.dtype
    ) -> list[Tensor]:
        """Gradients of x and of the weights."""

    def pointwise_mlp_fwd(
        self,
        x: Tensor,
        residual: Tensor | None,
        weights: MlpWeights,
        drop_scale: Tensor | None,
        act: str,
        recompute: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """y, then the hidden units before the activation, (P, K), which level 0 of ``recompute`` saves."""

    def pointwise_mlp_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        a: Tensor | None,
        weights: MlpWeights,
        drop_scale: Tensor | None,
        act: str,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Gradients of x and of the weights; the residual's is dy."""

    def patchify_stem_fwd(
        self, x: Tensor, weights: ConvNorm, eps: float, dtype: torch.dtype, out_dtype: torch.dtype
    ) -> Tensor:
        """LayerNorm of the patch convolution, (N, ⌊H/kh⌋, ⌊W/kw⌋, C') in ``out_dtype``.

        x: an image (N, C, H, W) of any strides.
        """

    def patchify_stem_bwd(
        self, dy: Tensor, x: Tensor, weights: ConvNorm, eps: float, dtype: torch.dtype, needs_x: bool
    ) -> list[Tensor]:
        """Gradients of the image and of the weights."""

    def downsample_fwd(self, x: Tensor, weights: NormConv, eps: float, dtype: torch.dtype) -> Tensor:
        """Patch convolution of LayerNorm(x), (N, ⌊H/kh⌋, ⌊W/kw⌋, C') in T."""

    def downsample_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        weights: NormConv,
        eps: float,
        dtype: torch.dtype,
        needs_norm: bool,
        needs_weight: bool,
        needs_bias: bool,
    ) -> list[Tensor]:
        """Gradients of x and of the weights; those of x and of LayerNorm's affine are needed or not together."""

    def frozen_downsample_fwd(self, x: Tensor, weights: FrozenDownsample, eps: float, dtype: torch.dtype) -> Tensor:
        """`downsample_fwd` on folded weights."""
