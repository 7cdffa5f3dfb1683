"""The downsampling layer on a CPU, for training: it keeps its input alone and normalises anew in the backward pass.

n = LayerNorm(x), y = patch convolution of n. PyTorch's own calls would save x and n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from . import batched
from .views import unlinked

_aten = torch.ops.aten


class Downsample(torch.autograd.Function):
    """`reference.downsample` with a backward pass that needs x and the parameters only.

    Inputs: x (N, H, W, C), ln_weight, ln_bias (C,), weight (C', C, kh, kw), bias (C',) or None, eps, and the dtype of
    the convolution, which under autocast is not that of x.
    """

    @staticmethod
    def forward(
        x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: Any
    ) -> Tensor:
        """(N, ⌊H/kh⌋, ⌊W/kw⌋, C')."""
        return unlinked(reference.downsample(x, ln_weight, ln_bias, weight, bias, eps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Save x and the parameters."""
        *tensors, ctx.eps, ctx.dtype = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the four parameters."""
        if batched.is_batched(dy):
            return (*batched.downsample_bwd(ctx, dy), None, None)
        inputs = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
        x, ln_weight, ln_bias, weight, _ = inputs
        needs, dtype, channels = ctx.needs_input_grad, ctx.dtype, x.shape[3:]
        n, mean, rstd = torch.native_layer_norm(x, channels, ln_weight.to(x.dtype), ln_bias.to(x.dtype), ctx.eps)
        kernel = list(weight.shape[2:])
        dn, dweight, dbias = _aten.convolution_backward(
            dy.permute(0, 3, 1, 2),
            n.to(dtype).permute(0, 3, 1, 2),
            weight.to(dtype),
            [weight.shape[0]],
            kernel,
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [any(needs[:3]), needs[3], needs[4]],
        )
        dx = dg = dbeta = None
        if any(needs[:3]):
            dn = dn.permute(0, 2, 3, 1).to(x.dtype).contiguous()
            dx, dg, dbeta = _aten.native_layer_norm_backward(
                dn, x, channels, mean, rstd, ln_weight.to(x.dtype), ln_bias.to(x.dtype), list(needs[:3])
            )
        found = (dx, dg, dbeta, dweight, dbias)
        pairs = zip(found, inputs, strict=True)
        return (*(None if g is None else g.to(t.dtype) for g, t in pairs), None, None)
