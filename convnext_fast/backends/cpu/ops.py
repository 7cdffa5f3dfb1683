"""The fused ops written with ATen calls: what ``fused=True`` runs on a CPU.

Activations stay (N, H, W, C); what is done to each pixel alone is in ``aten_rows``. Weights are used as they are:
folding them on every call (see ``folding``) costs as much as the products of a few hundred pixels.

P = N·H·W pixels, C channels, K hidden units, T the compute dtype, R the dtype of the residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import llvm, onednn
from .mlp import Mlp, Norm, linear, mlp_bwd, mlp_fwd, sum_dtype
from .packed_weights import prepared_block, prepared_downsample


def _dwconv(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, H, W, C) to (P, C) in T, a new tensor."""
    bias = None if bias is None else bias.to(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    groups, padding = weight.shape[0], [weight.shape[2] // 2, weight.shape[3] // 2]
    u = llvm.dwconv(x, weight, bias) if onednn.serves(x) else None
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
        alike = onednn.serves(x) and onednn.serves(du)
        dweight = llvm.dwconv_weight_grad(x, du_map, side) if alike else None
        dweight = onednn.dwconv_weight_grad(x, du_map, side) if dweight is None else dweight
    if needs_bias:
        dbias = du.sum(0, dtype=sum_dtype(du.dtype))
    return dx, dweight, dbias


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
    """(y, u, None, a); a is None from ``recompute`` 1 on, u is from 2 on.

    x, y: (N, H, W, C) in R; u: (P, C) in T, the convolution's output. Its LayerNorm statistics are cheaper to compute
    anew, with the normalised activations, than to save.
    """
    u = _dwconv(x, dwconv_weight, dwconv_bias, dtype)
    norm, mlp = Norm(ln_weight, ln_bias, eps), Mlp(w1, b1, w2, b2, gamma, act)
    saves_u = recompute < 2
    y, a = mlp_fwd(u, x.reshape(u.shape), norm, mlp, drop_scale, save_hidden=recompute == 0, overwrite=not saves_u)
    return y.view(x.shape), u if saves_u else None, None, a


def block_bwd(
    dy: Tensor,
    x: Tensor,
    u: Tensor | None,
    _: None,
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
    if u is None:
        u = _dwconv(x, dwconv_weight, dwconv_bias, dtype)
    norm, mlp = Norm(ln_weight, ln_bias, eps), Mlp(w1, b1, w2, b2, gamma, act)
    du, *d_parameters = mlp_bwd(dy.reshape(u.shape), u, a, norm, mlp, drop_scale)
    needs_bias = needs_dwconv and dwconv_bias is not None
    dx, dweight, dbias = _dwconv_bwd(du, x, dwconv_weight, needs_x, needs_dwconv, needs_bias)
    if dx is not None:
        dx = dx.add_(dy) if dx.dtype == dy.dtype else dx + dy
    return dx, dweight, dbias, *d_parameters


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
    """`block_fwd` on the weights of `folding.FrozenBlock`."""
    if dtype == torch.float32 and onednn.serves(x):
        weights = (dwconv_weight, dwconv_bias, w1, b1, w2, b2)
        return prepared_block(weights, act, x.shape)(x, eps)
    u = _dwconv(x, dwconv_weight, dwconv_bias, dtype)
    norm, mlp = Norm(None, None, eps), Mlp(w1, b1[0], w2, b2, None, act)
    y, _ = mlp_fwd(u, x.reshape(u.shape), norm, mlp, None, overwrite=True)
    return y.view(x.shape)


def frozen_downsample_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Convolution of patches of x̂, (N, ⌊H/kh⌋, ⌊W/kw⌋, C') in T, by what `folding.FrozenDownsample` holds."""
    if dtype == torch.float32 and onednn.serves(x):
        kernel = prepared_downsample(weight, bias)
        if kernel is not None:
            return kernel(x.contiguous(), eps)
    n = Norm(None, None, eps).forward(x.reshape(-1, x.shape[3]))[0].view(x.shape).to(dtype).permute(0, 3, 1, 2)
    bias, stride = bias.to(dtype), list(weight.shape[2:])
    if onednn.serves(n):
        y = onednn.frozen_convolution(n, weight, bias, stride, [0, 0], groups=1)
    else:
        y = F.conv2d(n, weight, bias, stride=stride)
    return y.permute(0, 2, 3, 1).contiguous()


def patchify_stem_fwd(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm of the patch convolution as one matrix product on copied patches, (N, H', W', C) in T.

    oneDNN's convolution of an image of three channels is slower, and its result not NHWC.
    """
    if dtype == torch.float32 and onednn.serves(image):
        stem = llvm.prepare_stem(weight, bias, ln_weight, ln_bias)
        if stem is not None:
            return stem(image.contiguous(), eps)
    kernel = weight.shape[2:]
    height, width = image.shape[2] // kernel[0], image.shape[3] // kernel[1]
    whole = image[:, :, : height * kernel[0], : width * kernel[1]].to(dtype)
    patches = whole.unflatten(3, (width, kernel[1])).unflatten(2, (height, kernel[0])).permute(0, 2, 4, 1, 3, 5)
    bias = None if bias is None else bias.to(dtype)
    out = (image.shape[0], height, width, weight.shape[0])
    if out[0] == 0:
        return image.new_empty(out, dtype=dtype)
    u = linear(patches.reshape(-1, weight[0].numel()), weight.flatten(1).to(dtype), bias)
    return Norm(ln_weight, ln_bias, eps).forward(u)[0].view(out)


def dwconv_layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, u, statistics): LayerNorm(u) and u = dwconv(x), (N, H, W, C) in T; statistics (2, P, 1) hold μ and rstd."""
    u = _dwconv(x, weight, bias, dtype)
    n, mean, rstd = Norm(ln_weight, ln_bias, eps).forward(u)
    return n.view(x.shape), u.view(x.shape), torch.stack((mean, rstd))


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
    rows = (-1, x.shape[3])
    norm = Norm(ln_weight, ln_bias, eps)
    du, dg, dbeta = norm.backward(dn.reshape(rows), u.view(rows), *statistics.unbind())
    return *_dwconv_bwd(du, x, weight, True, True, bias is not None), dg, dbeta


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
    residual = None if residual is None else residual.reshape(rows)
    mlp = Mlp(w1, b1, w2, b2, gamma, act)
    y, a = mlp_fwd(x.to(dtype).reshape(rows), residual, None, mlp, drop_scale, save_hidden=recompute == 0)
    return y.view(x.shape), a


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
    mlp = Mlp(w1, b1, w2, b2, gamma, act)
    dx, _, _, *d_mlp = mlp_bwd(dy.reshape(rows), x.to(dtype).reshape(rows), a, None, mlp, drop_scale)
    return dx.view(x.shape), *d_mlp
