"""The fused ops on a CPU (see `interface.Backend`): x86 kernels where supported, otherwise ATen calls.

Activations stay (N, H, W, C); pixelwise work is in ``mlp``. Weights are used as they are: folding them on every call
costs as much as the products of a few hundred pixels. For the types of long argument lists see `interface.Backend`.

P = N·H·W pixels, C channels, K hidden units, T the compute dtype, R the dtype of the residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.weights import BlockWeights, ConvNorm, FrozenBlock, FrozenDownsample, NormConv
from .. import reference
from ..interface import Gradients, like_inputs
from . import llvm, onednn
from .aten_layers import Mlp, Norm, linear, sum_dtype
from .mlp import mlp_bwd, mlp_fwd
from .packed_weights import prepared_block, prepared_downsample
from .response_norm import ResponseNorm


def _dwconv(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, H, W, C) to (P, C) in T, a new tensor."""
    bias = None if bias is None else bias.to(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    groups, padding = weight.shape[0], [weight.shape[2] // 2, weight.shape[3] // 2]
    u = llvm.dwconv(x, weight, bias) if onednn.supports(x) else None
    if u is None:
        u = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=groups).permute(0, 2, 3, 1)
    return u.reshape(-1, groups)


def _dwconv_bwd(
    du: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to x (N, H, W, C), weight and bias, those that are needed; du: (P, C)."""
    dx = dweight = dbias = None
    if needs_x:
        dx = _dwconv(du.view(x.shape), weight.flip(2, 3), None, du.dtype).view(x.shape)
    if needs_weight:
        du_map, side = du.view(x.shape), weight.shape[3]
        alike = onednn.supports(x) and onednn.supports(du)
        dweight = llvm.dwconv_weight_grad(x, du_map, side) if alike else None
        dweight = onednn.dwconv_weight_grad(x, du_map, side) if dweight is None else dweight
    if needs_bias:
        dbias = du.sum(0, dtype=sum_dtype(du.dtype))
    return dx, dweight, dbias


def block_fwd(
    x, weights, drop_scale, eps, act, recompute, dtype
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """y, and the fields of `Saved` that ``recompute`` keeps: u and a, (P, C) and (P, K) in T.

    LayerNorm's statistics are not saved, because recomputing them with the normalised activations is cheaper.
    """
    u = _dwconv(x, weights.dwconv_weight, weights.dwconv_bias, dtype)
    parts, saves_u = _parts(weights, x, eps, act), recompute < 2
    y, a, norms = mlp_fwd(u, x.reshape(u.shape), *parts, drop_scale, recompute == 0, overwrite=not saves_u)
    return y.view(x.shape), u if saves_u else None, None, a, norms if saves_u else None


def block_bwd(dy, x, saved, weights, drop_scale, eps, act, dtype, needs_x, needs_dwconv) -> Gradients:
    """Gradients of x and of the weights."""
    u, dwconv_weight = saved.u, weights.dwconv_weight
    if u is None:
        u = _dwconv(x, dwconv_weight, weights.dwconv_bias, dtype)
    parts = _parts(weights, x, eps, act)
    du, *d_parameters = mlp_bwd(dy.reshape(u.shape), u, saved.a, *parts, drop_scale, saved.norms)
    needs_bias = needs_dwconv and weights.dwconv_bias is not None
    dx, dweight, dbias = _dwconv_bwd(du, x, dwconv_weight, needs_x, needs_dwconv, needs_bias)
    if dx is not None:
        dx = dx.add_(dy) if dx.dtype == dy.dtype else dx + dy
    return like_inputs((dx, dweight, dbias, *d_parameters), x, weights)


def _parts(weights: BlockWeights, x: Tensor, eps: float, act: str) -> tuple[Norm, Mlp, ResponseNorm | None]:
    grn = _response_norm(x, weights.grn_weight, weights.grn_bias)
    return Norm(weights.ln_weight, weights.ln_bias, eps), Mlp(*weights.mlp(), act), grn


def _response_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> ResponseNorm | None:
    return None if gamma is None else ResponseNorm(gamma, beta, x.shape[1] * x.shape[2])


def frozen_block_fwd(x: Tensor, weights: FrozenBlock, eps: float, act: str, dtype: torch.dtype) -> Tensor:
    """The block on folded weights."""
    if dtype == torch.float32 and onednn.supports(x):
        kernel = prepared_block(weights, act)
        if kernel is not None:
            return kernel(x, eps)
    u = _dwconv(x, weights.dwconv_weight, weights.dwconv_bias, dtype)
    norm, mlp = Norm(None, None, eps), Mlp(weights.w1, weights.b1[0], weights.w2, weights.b2, None, act)
    grn = _response_norm(x, weights.grn_weight, None)
    return mlp_fwd(u, x.reshape(u.shape), norm, mlp, grn, None, overwrite=True)[0].view(x.shape)


def dwconv_layernorm_fwd(x: Tensor, weights: ConvNorm, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(u), u, and the statistics (2, P, 1): mean and reciprocal standard deviation."""
    u = _dwconv(x, weights.weight, weights.bias, dtype)
    n, mean, rstd = Norm(weights.ln_weight, weights.ln_bias, eps).forward(u)
    return n.view(x.shape), u.view(x.shape), torch.stack((mean, rstd))


def dwconv_layernorm_bwd(dn, x, u, statistics, weights, eps, dtype) -> Gradients:
    """Gradients of x and of the weights."""
    rows = (-1, x.shape[3])
    norm = Norm(weights.ln_weight, weights.ln_bias, eps)
    du, dg, dbeta = norm.backward(dn.reshape(rows), u.view(rows), *statistics.unbind())
    dwconv = _dwconv_bwd(du, x, weights.weight, True, True, weights.bias is not None)
    return like_inputs((*dwconv, dg, dbeta), x, weights)


def pointwise_mlp_fwd(x, residual, weights, drop_scale, act, recompute, dtype) -> tuple[Tensor, Tensor | None]:
    """y, and the hidden units at level 0 of ``recompute``."""
    rows = (-1, x.shape[3])
    residual, parts = None if residual is None else residual.reshape(rows), (None, Mlp(*weights, act), None)
    y, a, _ = mlp_fwd(x.to(dtype).reshape(rows), residual, *parts, drop_scale, save_hidden=recompute == 0)
    return y.view(x.shape), a


def pointwise_mlp_bwd(dy, x, a, weights, drop_scale, act, dtype) -> Gradients:
    """Gradients of x and of the weights; the residual's is dy."""
    rows, parts = (-1, x.shape[3]), (None, Mlp(*weights, act), None)
    dx, _, _, *d_mlp = mlp_bwd(dy.reshape(rows), x.to(dtype).reshape(rows), a, *parts, drop_scale)
    return like_inputs((dx.view(x.shape), *d_mlp[:5]), x, weights)


def patchify_stem_fwd(x: Tensor, weights: ConvNorm, eps: float, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """LayerNorm of the patch convolution as one matrix product on copied patches.

    oneDNN's convolution of an image with three channels is slower, and its result is not NHWC.
    """
    weight, bias, ln_weight, ln_bias = weights
    if dtype == out_dtype == torch.float32 and onednn.supports(x):
        stem = llvm.prepare_stem(*weights)
        if stem is not None:
            return stem(x.contiguous(), eps)
    kernel = weight.shape[2:]
    height, width = x.shape[2] // kernel[0], x.shape[3] // kernel[1]
    whole = x[:, :, : height * kernel[0], : width * kernel[1]].to(dtype)
    patches = whole.unflatten(3, (width, kernel[1])).unflatten(2, (height, kernel[0])).permute(0, 2, 4, 1, 3, 5)
    bias = None if bias is None else bias.to(dtype)
    out = (x.shape[0], height, width, weight.shape[0])
    if out[0] == 0:
        return x.new_empty(out, dtype=out_dtype)
    u = linear(patches.reshape(-1, weight[0].numel()), weight.flatten(1).to(dtype), bias)
    return Norm(ln_weight, ln_bias, eps).forward(u)[0].view(out).to(out_dtype)


def downsample_fwd(x: Tensor, weights: NormConv, eps: float, dtype: torch.dtype) -> Tensor:
    """Patch convolution of LayerNorm(x)."""
    n = Norm(weights.ln_weight, weights.ln_bias, eps).forward(x.reshape(-1, x.shape[3]))[0].view(x.shape)
    return reference.patch_conv(n, weights.weight, weights.bias, dtype=dtype)


def downsample_bwd(dy, x, weights, eps, dtype, needs_norm, needs_weight, needs_bias) -> Gradients:
    """Gradients of x and of the weights, from x alone: LayerNorm(x), which PyTorch would save, is recomputed."""
    norm, rows = Norm(weights.ln_weight, weights.ln_bias, eps), x.reshape(-1, x.shape[3])
    n, mean, rstd = norm.forward(rows)
    weight = weights.weight
    dn, dweight, dbias = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2),
        n.view(x.shape).to(dtype).permute(0, 3, 1, 2),
        weight.to(dtype),
        [weight.shape[0]],
        list(weight.shape[2:]),
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [needs_norm, needs_weight, needs_bias],
    )
    dx = dg = dbeta = None
    if needs_norm:
        dn = dn.permute(0, 2, 3, 1).to(x.dtype).reshape(rows.shape)
        dx, dg, dbeta = norm.backward(dn, rows, mean, rstd)
        dx = dx.view(x.shape)
    return like_inputs((dx, dg, dbeta, dweight, dbias), x, weights)


def frozen_downsample_fwd(x: Tensor, weights: FrozenDownsample, eps: float, dtype: torch.dtype) -> Tensor:
    """Patch convolution of x̂ by folded weights."""
    weight, bias = weights
    if dtype == torch.float32 and onednn.supports(x):
        kernel = prepared_downsample(weight, bias)
        if kernel is not None:
            return kernel(x.contiguous(), eps)
    n = Norm(None, None, eps).forward(x.reshape(-1, x.shape[3]))[0].view(x.shape).to(dtype).permute(0, 3, 1, 2)
    return F.conv2d(n, weight, bias.to(dtype), stride=weight.shape[2:]).permute(0, 2, 3, 1).contiguous()
