"""The fused ops written with ATen calls: what ``fused=True`` runs on a CPU.

The same mathematics and the same saved tensors as the Triton kernels (see ``folding`` for the identities): activations
stay (N, H, W, C), LayerNorm's affine and the layer scale live in the weights, rows are worked on in blocks whose hidden
activations stay in the cache, and the residual is added by the GEMM.

P = N·H·W pixels, C channels, K hidden units, T the compute dtype, R the dtype of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .folding import Folded, fold, unfold_gradients

_aten = torch.ops.aten

_ACTIVATIONS_ = {
    "gelu": _aten.gelu_,
    "gelu_new": partial(_aten.gelu_, approximate="tanh"),
    "relu": torch.relu_,
    "silu": _aten.silu_,
    "selu": torch.selu_,
}

# Hidden activations of a block of rows: large enough for a GEMM at full speed, small enough for the last-level cache.
_BLOCK_BYTES = 4 << 20
_LEAST_ROWS = 256


def _activation_bwd(dh: Tensor, a: Tensor, act: str) -> Tensor:
    """dh · act'(a)."""
    if act == "gelu":
        return _aten.gelu_backward(dh, a)
    if act == "gelu_new":
        return _aten.gelu_backward(dh, a, approximate="tanh")
    if act == "relu":
        return _aten.threshold_backward(dh, a, 0)
    if act == "silu":
        return _aten.silu_backward(dh, a)
    return _aten.elu_backward(dh, 1.6732632423543772, 1.0507009873554805, 1.0, False, a)


def _row_blocks(rows: Tensor, hidden: int) -> Iterator[slice]:
    """Slices of rows for cache-sized work; one slice for a tensor that a compiler traces, which tiles by itself."""
    count = rows.shape[0]
    if type(rows) is not Tensor:
        yield slice(0, count)
        return
    block = max(_LEAST_ROWS, _BLOCK_BYTES // (hidden * rows.element_size()))
    for first in range(0, count, block):
        yield slice(first, min(first + block, count))


def _dwconv(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, H, W, C) to (P, C) in T."""
    bias = None if bias is None else bias.to(dtype)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    u = F.conv2d(x.to(dtype).permute(0, 3, 1, 2), weight.to(dtype), bias, padding=padding, groups=weight.shape[0])
    return u.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])


def _dwconv_bwd(
    du: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to x (N, H, W, C), weight and bias, those that ``needs`` asks for; du: (P, C)."""
    channels = x.shape[3]
    dx, dweight, dbias = _aten.convolution_backward(
        du.view(x.shape).permute(0, 3, 1, 2),
        x.to(du.dtype).permute(0, 3, 1, 2),
        weight.to(du.dtype),
        [channels],
        [1, 1],
        [weight.shape[2] // 2, weight.shape[3] // 2],
        [1, 1],
        False,
        [0, 0],
        channels,
        list(needs),
    )
    return None if dx is None else dx.permute(0, 2, 3, 1), dweight, dbias


def _normalise(u: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ = (u − μ)·rstd: x̂ (P, C) and rstd (P, 1)."""
    normalised, _, rstd = torch.native_layer_norm(u, [u.shape[1]], None, None, eps)
    return normalised, rstd


def _normalise_bwd(d_normalised: Tensor, normalised: Tensor, rstd: Tensor) -> Tensor:
    """du = rstd·(dx̂ − mean(dx̂) − x̂·mean(dx̂·x̂)), which is LayerNorm's backward at μ = 0, rstd = 1, times rstd."""
    channels = [normalised.shape[1]]
    du, _, _ = _aten.native_layer_norm_backward(
        d_normalised,
        normalised,
        channels,
        torch.zeros_like(rstd),
        torch.ones_like(rstd),
        None,
        None,
        [True, False, False],
    )
    return du.mul_(rstd)


def _mlp_fwd(
    x: Tensor, residual: Tensor | None, folded: Folded, drop_scale: Tensor | None, act: str, save_hidden: bool
) -> tuple[Tensor, Tensor | None]:
    """y = residual + drop_scale·(act(x·w1ᵀ + b1)·w2ᵀ + b2), and a = x·w1ᵀ + b1 if ``save_hidden``.

    x: (P, C) in T; residual and y: (P, C) in R; drop_scale: (N,), for P/N rows each; a: (P, K) in T.
    """
    activation_ = _ACTIVATIONS_[act]
    b1, b2 = folded.b1.to(x.dtype), folded.b2.to(x.dtype)
    w1, w2 = folded.w1.t(), folded.w2.t()
    scale = _row_scale(drop_scale, x)
    y = torch.empty_like(x if residual is None else residual)
    saved = x.new_empty(x.shape[0], w1.shape[1]) if save_hidden else None
    for rows in _row_blocks(x, w1.shape[1]):
        h = torch.addmm(b1, x[rows], w1)
        if saved is not None:
            saved[rows] = h
        activation_(h)
        if residual is not None and scale is None and residual.dtype == x.dtype:
            torch.add(residual[rows], b2, out=y[rows])
            y[rows].addmm_(h, w2)
            continue
        z = torch.addmm(b2, h, w2)
        if scale is not None:
            z *= scale[rows]
        y[rows] = z if residual is None else residual[rows] + z
    return y, saved


def _mlp_bwd(
    dy: Tensor, x: Tensor, a: Tensor | None, folded: Folded, drop_scale: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, D, db1, E, t) of `folding`, for dy (P, C) in R, x (P, C) in T and a (P, K) or None to compute it anew.

    dx: (P, C) in T; D: (K, C), db1: (K,), E: (C, K), t: (C,) in at least float32. For 16-bit T they sum in float32
    inside one GEMM and round once, as PyTorch's own weight gradients do.
    """
    activation_ = _ACTIVATIONS_[act]
    b1 = folded.b1.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    channels, hidden = x.shape[1], folded.w1.shape[0]
    d, e = x.new_zeros(hidden, channels, dtype=wide), x.new_zeros(channels, hidden, dtype=wide)
    db1, t = x.new_zeros(hidden, dtype=wide), x.new_zeros(channels, dtype=wide)
    scale = _row_scale(drop_scale, x)
    dx = torch.empty_like(x)
    for rows in _row_blocks(x, hidden):
        dz = dy[rows].to(x.dtype)
        if scale is not None:
            dz = dz * scale[rows]
        pre = torch.addmm(b1, x[rows], folded.w1.t()) if a is None else a[rows]
        da = _activation_bwd(dz @ folded.w2, pre, act)
        h = activation_(pre if a is None else pre.clone())
        _accumulate(e, dz.t(), h)
        _accumulate(d, da.t(), x[rows])
        t += dz.sum(0, dtype=wide)
        db1 += da.sum(0, dtype=wide)
        torch.mm(da, folded.w1, out=dx[rows])
    return dx, d, db1, e, t


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left·right."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _row_scale(drop_scale: Tensor | None, x: Tensor) -> Tensor | None:
    """The drop-path factor of each row: (P, 1) in T."""
    if drop_scale is None:
        return None
    samples = drop_scale.shape[0]
    return drop_scale.to(x.dtype)[:, None].expand(samples, x.shape[0] // max(samples, 1)).reshape(-1, 1)


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
    """(y, x̂, rstd, a); a is None from ``recompute`` 1 on, x̂ and rstd are from 2 on. x, y: (N, H, W, C) in R."""
    u = _dwconv(x, dwconv_weight, dwconv_bias, dtype)
    normalised, rstd = _normalise(u, eps)
    folded = fold(ln_weight, ln_bias, w1, b1, w2, b2, gamma, dtype)
    y, a = _mlp_fwd(normalised, x.reshape(u.shape), folded, drop_scale, act, recompute == 0)
    if recompute >= 2:
        return y.view(x.shape), None, None, None
    return y.view(x.shape), normalised, rstd, a


def block_bwd(
    dy: Tensor,
    x: Tensor,
    normalised: Tensor | None,
    rstd: Tensor | None,
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
    if normalised is None:
        normalised, rstd = _normalise(_dwconv(x, dwconv_weight, dwconv_bias, dtype), eps)
    folded = fold(ln_weight, ln_bias, w1, b1, w2, b2, gamma, dtype)
    d_normalised, *sums = _mlp_bwd(dy.reshape(normalised.shape), normalised, a, folded, drop_scale, act)
    dg, dbeta, dw1, dw2, db2, dgamma = unfold_gradients(*sums, ln_weight, ln_bias, w1, w2, b2, gamma)
    du = _normalise_bwd(d_normalised, normalised, rstd)
    needs = (needs_x, needs_dwconv, needs_dwconv and dwconv_bias is not None)
    dx, dweight, dbias = _dwconv_bwd(du, x, dwconv_weight, needs)
    if dx is not None:
        dx = dx.add_(dy) if dx.dtype == dy.dtype else dx + dy
    return dx, dweight, dbias, dg, dbeta, dw1, sums[1], dw2, db2, dgamma


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
    n, mean, rstd = torch.native_layer_norm(u, [u.shape[1]], ln_weight.to(dtype), ln_bias.to(dtype), eps)
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
    du, dg, dbeta = _aten.native_layer_norm_backward(
        dn.reshape(rows),
        u.view(rows),
        [x.shape[3]],
        *statistics.unbind(),
        ln_weight.to(dtype),
        ln_bias.to(dtype),
        [True, True, True],
    )
    dx, dweight, dbias = _dwconv_bwd(du, x, weight, (True, True, bias is not None))
    return dx, dweight, dbias, dg, dbeta


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
    folded = fold(None, None, w1, b1, w2, b2, gamma, dtype)
    residual = None if residual is None else residual.reshape(rows)
    y, a = _mlp_fwd(x.to(dtype).reshape(rows), residual, folded, drop_scale, act, recompute == 0)
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
    folded = fold(None, None, w1, b1, w2, b2, gamma, dtype)
    dx, *sums = _mlp_bwd(dy.reshape(rows), x.to(dtype).reshape(rows), a, folded, drop_scale, act)
    _, _, dw1, dw2, db2, dgamma = unfold_gradients(*sums, None, None, w1, w2, b2, gamma)
    return dx.view(x.shape), dw1, sums[1], dw2, db2, dgamma
