"""Backward of the fused ops for a batch of cotangents at a time: ``is_grads_batched``, vectorised Jacobians.

Nothing announces it when the forward runs, and the fused backward writes into memory of its own, which no batch passes
through. PyTorch's own formulas let it pass: so the plain reference runs again, with gradients. One function for each
op, of the context that `operators` (or `downsampling`) filled, with the gradients of the op's tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import reference

Gradients = tuple[Tensor | None, ...]


def is_batched(dy: Tensor) -> bool:
    """Whether dy stands for a batch, of `torch.func.vmap` or of autograd's own."""
    return torch._C._functorch.is_batchedtensor(dy) or torch._C._functorch.is_legacy_batchedtensor(dy)


def _reference_bwd(function: Callable[..., Tensor], dy: Tensor, *tensors: Tensor | None) -> Gradients:
    """The gradient of ``function`` with respect to each of the tensors that is there."""

    def of_present(*present: Tensor) -> Tensor:
        given = iter(present)
        return function(*(None if t is None else next(given) for t in tensors))

    present = [t for t in tensors if t is not None]
    if torch._C._functorch.is_batchedtensor(dy):
        y, pullback = torch.func.vjp(of_present, *present)
        found = iter(pullback(dy.to(y.dtype)))
    else:
        again = torch.is_grad_enabled()  # a derivative of the gradient is wanted
        with torch.enable_grad():
            leaves = [t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in present]
            y = of_present(*leaves)
        found = iter(torch.autograd.grad(y, leaves, dy.to(y.dtype), create_graph=again))
    return tuple(None if t is None else next(found) for t in tensors)


def block_bwd(ctx: Any, dy: Tensor) -> Gradients:
    """Gradients of x, of the nine parameters, and None for the drop-path factors."""
    x, *parameters_and_scale = ctx.saved_tensors[:11]

    def plain(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor | None, beta: Tensor | None, *mlp: Tensor) -> Tensor:
        g, beta = x.new_ones(x.shape[3]) if g is None else g, x.new_zeros(x.shape[3]) if beta is None else beta
        return reference.convnext_block(x, weight, bias, g, beta, *mlp, ctx.eps, ctx.act, dtype=ctx.dtype)

    return (*_reference_bwd(plain, dy, x, *parameters_and_scale)[:-1], None)


def dwconv_layernorm_bwd(ctx: Any, dn: Tensor) -> Gradients:
    """Gradients of x and of the four parameters."""
    x, _, _, *parameters = ctx.saved_tensors
    return _reference_bwd(partial(reference.dwconv_layernorm, eps=ctx.eps, dtype=ctx.dtype), dn, x, *parameters)


def pointwise_mlp_bwd(ctx: Any, dy: Tensor) -> Gradients:
    """Gradients of x, of the residual, of the five parameters, and None for the drop-path factors."""
    x, _, *parameters_and_scale = ctx.saved_tensors

    def plain(x: Tensor, *mlp: Tensor) -> Tensor:
        return reference.pointwise_mlp(x, None, *mlp, ctx.act, dtype=ctx.dtype)

    dx, *rest, _ = _reference_bwd(plain, dy, x, *parameters_and_scale)
    return (dx, dy if ctx.has_residual else None, *rest, None)


def patchify_stem_bwd(ctx: Any, dy: Tensor) -> Gradients:
    """Gradients of the image and of the four parameters."""
    return _reference_bwd(partial(reference.patchify_stem, eps=ctx.eps, dtype=ctx.dtype), dy, *ctx.saved_tensors)


def downsample_bwd(ctx: Any, dy: Tensor) -> Gradients:
    """Gradients of x and of the four parameters."""
    return _reference_bwd(partial(reference.downsample, eps=ctx.eps, dtype=ctx.dtype), dy, *ctx.saved_tensors)
