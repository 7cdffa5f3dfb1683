"""The fused ops by the Triton kernels: what ``fused=True`` runs on a GPU.

The same functions as in `aten`, one for each operator, made of the launchers of ``convnext_fast.kernels``.
T is the compute dtype, R the dtype of the residual stream; the kernels sum and keep statistics in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.dwconv import dwconv_dgrad, dwconv_fwd, dwconv_wgrad
from ..kernels.dwconv.wgrad import dwconv_wgrad_partials
from ..kernels.folding import fold_bwd, fold_fwd
from ..kernels.layernorm import layernorm_bwd, layernorm_fwd
from ..kernels.mlp import mlp_bwd, mlp_fwd
from ..kernels.patchify.bwd import downsample_bwd as _downsample_bwd
from ..kernels.patchify.bwd import stem_bwd
from ..kernels.patchify.fwd import downsample_fwd as _downsample_fwd
from ..kernels.patchify.fwd import fold_downsample, stem_fwd
from ..kernels.replaying import replayed


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, or what they are in contiguous memory, as the kernels read them."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _above_zero(eps: float) -> float:
    """``eps``, or next to nothing: rows beyond the pixels, which a tile holds too, are divided by its root."""
    return max(eps, 1e-37)


@replayed
def block_fwd(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
    recompute: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(y, u, partial statistics of u, a); a is None from ``recompute`` 1 on, u and its statistics are from 2 on."""
    rows = (-1, x.shape[3])
    u, statistics = dwconv_fwd(x, *_dense(dwconv_weight, dwconv_bias), dtype)
    w1, b1, ln_weight, ln_bias, w2 = _dense(w1, b1, ln_weight, ln_bias, w2)
    b2, gamma, drop_scale = _dense(b2, gamma, drop_scale)
    folded = fold_fwd(w1, b1, ln_weight, ln_bias, w2, None, dtype)
    y, a = mlp_fwd(
        u.view(rows), statistics, x.view(rows), *folded, b2, gamma, drop_scale, _above_zero(eps), act, recompute == 0
    )
    if recompute >= 2:
        return y.view(x.shape), None, None, None
    return y.view(x.shape), u, statistics, a


@replayed
def block_bwd(
    dy: Tensor,
    x: Tensor,
    u: Tensor | None,
    statistics: Tensor | None,
    a: Tensor | None,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
    dtype: torch.dtype,
    needs_x: bool,
    needs_dwconv: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the nine parameters, in the order of `block_fwd`."""
    rows = (-1, x.shape[3])
    dwconv_weight, dwconv_bias, ln_weight, ln_bias = _dense(dwconv_weight, dwconv_bias, ln_weight, ln_bias)
    w1, b1, w2, b2, gamma, drop_scale = _dense(w1, b1, w2, b2, gamma, drop_scale)
    if u is None:
        u, statistics = dwconv_fwd(x, dwconv_weight, dwconv_bias, dtype)
    folded = fold_fwd(w1, b1, ln_weight, ln_bias, w2, gamma, dtype)
    du, sums = mlp_bwd(dy.view(rows), u.view(rows), statistics, a, *folded, drop_scale, _above_zero(eps), act)
    du = du.view(x.shape)
    dx = dwconv_dgrad(du, dwconv_weight, dy) if needs_x else None
    dwconv = None
    if needs_dwconv:
        dwconv = (dwconv_wgrad_partials(x, du, dwconv_weight.shape[3]), dwconv_weight, dwconv_bias)
    return dx, *fold_bwd(sums, ln_weight, ln_bias, w1, b1, w2, b2, gamma, dwconv)


@replayed
def frozen_block_fwd(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
    act: str,
    dtype: torch.dtype,
) -> Tensor:
    """`block_fwd` on the weights of `folding.FrozenBlock`, w1 and w2 in T."""
    rows = (-1, x.shape[3])
    u, statistics = dwconv_fwd(x, *_dense(dwconv_weight, dwconv_bias), dtype)
    w1, b1, w2, b2 = _dense(w1, b1, w2, b2)
    y, _ = mlp_fwd(u.view(rows), statistics, x.view(rows), w1, b1, w2, b2, None, None, _above_zero(eps), act, False)
    return y.view(x.shape)


@replayed
def dwconv_layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, u, partial statistics): LayerNorm(u) and u = dwconv(x), (N, H, W, C) in T."""
    u, statistics = dwconv_fwd(x, *_dense(weight, bias), dtype)
    return layernorm_fwd(u, statistics, *_dense(ln_weight, ln_bias), _above_zero(eps)), u, statistics


@replayed
def dwconv_layernorm_bwd(
    dn: Tensor,
    x: Tensor,
    u: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, ln_weight and ln_bias."""
    du, dg, dbeta = layernorm_bwd(dn, u, statistics, ln_weight.contiguous(), _above_zero(eps))
    dx = dwconv_dgrad(du, weight.contiguous(), None)
    dweight, dbias = dwconv_wgrad(x, du, weight.shape[3], weight.dtype)
    return dx, dweight, dbias, dg, dbeta


@replayed
def pointwise_mlp_fwd(
    x: Tensor,
    residual: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    act: str,
    recompute: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """(y, a); a is None from ``recompute`` 1 on. x, residual, y: (N, H, W, C)."""
    rows = (-1, x.shape[3])
    w1, b1, w2, b2, gamma, drop_scale = _dense(w1, b1, w2, b2, gamma, drop_scale)
    folded = fold_fwd(w1, b1, None, None, w2, None, dtype)
    residual = None if residual is None else residual.view(rows)
    inputs = x.to(dtype).view(rows)
    y, a = mlp_fwd(inputs, None, residual, *folded, b2, gamma, drop_scale, 0.0, act, recompute == 0)
    return y.view(x.shape), a


@replayed
def pointwise_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    a: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    act: str,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w2, b2 and gamma; the residual's is dy."""
    rows = (-1, x.shape[3])
    w1, b1, w2, b2, gamma, drop_scale = _dense(w1, b1, w2, b2, gamma, drop_scale)
    folded = fold_fwd(w1, b1, None, None, w2, gamma, dtype)
    dx, sums = mlp_bwd(dy.view(rows), x.to(dtype).view(rows), None, a, *folded, drop_scale, 0.0, act)
    return dx.view(x.shape), *fold_bwd(sums, None, None, w1, b1, w2, b2, gamma)[4:]


@replayed
def patchify_stem_fwd(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm of the patch convolution, (N, H', W', C) in T."""
    return stem_fwd(image, *_dense(weight, bias, ln_weight, ln_bias), _above_zero(eps), dtype)


@replayed
def patchify_stem_bwd(
    dy: Tensor,
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    needs_image: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of image, weight, bias, ln_weight and ln_bias."""
    return stem_bwd(dy, image, *_dense(weight, bias, ln_weight, ln_bias), _above_zero(eps), needs_image)


@replayed
def downsample_fwd(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Patch convolution of LayerNorm(x), (N, ⌊H/kh⌋, ⌊W/kw⌋, C') in T."""
    wg, bg = fold_downsample(*_dense(weight, bias, ln_weight, ln_bias), dtype)
    return _downsample_fwd(x, wg, bg, _above_zero(eps), dtype)


@replayed
def frozen_downsample_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`downsample_fwd` on the weights of `folding.FrozenDownsample`, ``weight`` in T."""
    return _downsample_fwd(x, *_dense(weight.permute(0, 2, 3, 1), bias), _above_zero(eps), dtype)


@replayed
def downsample_bwd(
    dy: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, ln_weight, ln_bias, weight and bias."""
    parameters = _dense(weight, bias, ln_weight, ln_bias)
    dx, dweight, dbias, dg, dbeta = _downsample_bwd(dy, x, *parameters, _above_zero(eps), dtype)
    return dx, dg, dbeta, dweight, dbias
