"""The fused ops written with ATen calls: what ``fused=True`` runs on a CPU.

Activations stay (N, H, W, C), rows are worked on in blocks whose hidden activations stay in the cache, the normalised
activations are never saved, and in float32 the work goes to oneDNN (see ``onednn``), which applies the activation and
the residual inside its matrix products. Weights are used as they are: folding them on every call (see ``folding``)
costs as much as the products of a few hundred pixels.

P = N·H·W pixels, C channels, K hidden units, T the compute dtype, R the dtype of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn

_aten = torch.ops.aten

_ACTIVATIONS_ = {
    "gelu": _aten.gelu_,
    "gelu_new": partial(_aten.gelu_, approximate="tanh"),
    "relu": torch.relu_,
    "silu": _aten.silu_,
    "selu": torch.selu_,
}

# Rows of a block: enough for a matrix product at full speed, few enough for their hidden activations to stay in the
# last-level cache.
_MOST_ROWS, _LEAST_ROWS = 2048, 256
_BLOCK_BYTES = 16 << 20


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
    """Slices of rows for cache-sized work; one slice for a tensor that a compiler traces."""
    count = rows.shape[0]
    if type(rows) is not Tensor:
        yield slice(0, count)
        return
    block = min(_MOST_ROWS, max(_LEAST_ROWS, _BLOCK_BYTES // (hidden * rows.element_size())))
    for first in range(0, count, block):
        yield slice(first, min(first + block, count))


def _dwconv(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, H, W, C) to (P, C) in T."""
    bias = None if bias is None else bias.to(dtype)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    u = F.conv2d(x.to(dtype).permute(0, 3, 1, 2), weight.to(dtype), bias, padding=padding, groups=weight.shape[0])
    return u.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])


def _dwconv_bwd(
    du: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to x (N, H, W, C), weight and bias, those that are needed; du: (P, C)."""
    dx = dweight = dbias = None
    if needs_x:
        dx = _dwconv(du.view(x.shape), weight.flip(2, 3), None, du.dtype).view(x.shape)
    if needs_weight:
        dweight = onednn.dwconv_weight_grad(x, du.view(x.shape), weight.shape[3])
    if needs_bias:
        dbias = du.sum(0, dtype=_wide(du.dtype))
    return dx, dweight, dbias


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.promote_types(dtype, torch.float32)


def _affine(u: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """LayerNorm's affine in a dtype in which PyTorch also keeps the statistics."""
    wide = _wide(u.dtype)
    if wide != u.dtype and weight is None:
        weight = u.new_ones(u.shape[1], dtype=wide)
    return None if weight is None else weight.to(wide), None if bias is None else bias.to(wide)


def _normalise(u: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm of u (P, C), and its statistics (2, P, 1): μ and rstd."""
    n, mean, rstd = torch.native_layer_norm(u, [u.shape[1]], *_affine(u, weight, bias), eps)
    return n, torch.stack((mean, rstd))


def _normalise_bwd(
    dn: Tensor, u: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(du, dg, dβ)."""
    needs = [True, weight is not None, bias is not None]
    affine = _affine(u, weight, bias)
    return _aten.native_layer_norm_backward(dn, u, [u.shape[1]], *statistics.unbind(), *affine, needs)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None) -> Tensor:
    """act(x·weightᵀ + bias) in the dtype of x."""
    if onednn.serves(x):
        inside = act if act is not None and onednn.fuses(act) else None
        y = onednn.linear(x, weight, bias, inside)
    else:
        inside = None
        y = F.linear(x, weight, bias)
    return y if act == inside else _ACTIVATIONS_[act](y)


def _mlp_fwd(
    x: Tensor,
    residual: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    act: str,
    save_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """y = residual + drop_scale·γ·(act(x·w1ᵀ + b1)·w2ᵀ + b2), and a = x·w1ᵀ + b1 if ``save_hidden``.

    x: (P, C) in T; residual and y: (P, C) in R; drop_scale: (N,), for P/N rows each; a: (P, K) in T.
    """
    w1, b1, w2, b2 = (t.to(x.dtype) for t in (w1, b1, w2, b2))
    scale = _row_scale(drop_scale, x)
    y = torch.empty_like(x if residual is None else residual)
    saved = x.new_empty(x.shape[0], w1.shape[0]) if save_hidden else None
    for rows in _row_blocks(x, w1.shape[0]):
        if saved is None:
            h = _linear(x[rows], w1, b1, act)
        else:
            saved[rows] = _linear(x[rows], w1, b1)
            h = _ACTIVATIONS_[act](saved[rows].clone())
        if residual is not None and gamma is None and scale is None and onednn.serves(h) and onednn.serves(residual):
            y[rows] = onednn.linear_add(h, w2, b2, residual[rows])
            continue
        z = _linear(h, w2, b2)
        if scale is not None:
            z *= scale[rows]
        if residual is None:
            y[rows] = z if gamma is None else z * gamma
        elif gamma is None:
            torch.add(residual[rows], z, out=y[rows])
        else:
            torch.addcmul(residual[rows], z, gamma, out=y[rows])
    return y, saved


def _mlp_bwd(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dx, dw1, db1, dw2, db2, dγ) for dy (P, C) in R, x (P, C) in T and a (P, K) or None to compute it anew.

    dx: (P, C) in T, the others in at least float32. γ's gradient needs no z: for E = Σ_p dz' ⊗ h and t = Σ_p dz', with
    dz' = drop_scale·dy, it is dγ = Σ_k w2∘E + b2·t; dw2 = γ∘E and db2 = γ·t.
    """
    dtype, wide = x.dtype, _wide(x.dtype)
    compute = [t.to(dtype) for t in (w1, b1, w2)]
    hidden, channels = w1.shape
    dw1, e = x.new_zeros(hidden, channels, dtype=wide), x.new_zeros(channels, hidden, dtype=wide)
    db1, t = x.new_zeros(hidden, dtype=wide), x.new_zeros(channels, dtype=wide)
    scale = _row_scale(drop_scale, x)
    dx = torch.empty_like(x)
    for rows in _row_blocks(x, hidden):
        dz = dy[rows].to(dtype)
        if scale is not None:
            dz = dz * scale[rows]
        pre = _linear(x[rows], compute[0], compute[1]) if a is None else a[rows]
        dh = _linear(dz if gamma is None else (dz * gamma).to(dtype), compute[2].t())
        da = _activation_bwd(dh, pre, act)
        h = _ACTIVATIONS_[act](pre if a is None else pre.clone())
        _accumulate(e, dz.t(), h)
        _accumulate(dw1, da.t(), x[rows])
        t += dz.sum(0, dtype=wide)
        db1 += da.sum(0, dtype=wide)
        dx[rows] = _linear(da, compute[0].t())
    if gamma is None:
        return dx, dw1, db1, e, t, None
    gamma = gamma.to(wide)
    dgamma = torch.addcmul((w2 * e).sum(1), b2.to(wide), t)
    return dx, dw1, db1, e.mul_(gamma[:, None]), t * gamma, dgamma


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left·right. Products of bfloat16 sum in float32 and round once, as PyTorch's own weight gradients do;
    those of float16 are float32, lest the sum, which γ does not make small yet, overflows."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.dtype == torch.float16:
        total.addmm_(left.float(), right.float())
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
    """(y, u, statistics of u, a); a is None from ``recompute`` 1 on, u and its statistics are from 2 on.

    x, y: (N, H, W, C) in R; u: (P, C), the convolution's output.
    """
    u = _dwconv(x, dwconv_weight, dwconv_bias, dtype)
    n, statistics = _normalise(u, ln_weight, ln_bias, eps)
    y, a = _mlp_fwd(n, x.reshape(u.shape), w1, b1, w2, b2, gamma, drop_scale, act, recompute == 0)
    if recompute >= 2:
        return y.view(x.shape), None, None, None
    return y.view(x.shape), u, statistics, a


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
    if u is None:
        u = _dwconv(x, dwconv_weight, dwconv_bias, dtype)
    n, statistics = _normalise(u, ln_weight, ln_bias, eps)
    dn, *d_mlp = _mlp_bwd(dy.reshape(n.shape), n, a, w1, b1, w2, b2, gamma, drop_scale, act)
    du, dg, dbeta = _normalise_bwd(dn, u, statistics, ln_weight, ln_bias)
    needs_bias = needs_dwconv and dwconv_bias is not None
    dx, dweight, dbias = _dwconv_bwd(du, x, dwconv_weight, needs_x, needs_dwconv, needs_bias)
    if dx is not None:
        dx = dx.add_(dy) if dx.dtype == dy.dtype else dx + dy
    return dx, dweight, dbias, dg, dbeta, *d_mlp


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
    u = _dwconv(x, dwconv_weight, dwconv_bias, dtype)
    normalised, _ = _normalise(u, None, None, eps)
    y, _ = _mlp_fwd(normalised, x.reshape(u.shape), w1, b1[0], w2, b2, None, None, act, False)
    return y.view(x.shape)


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
    n, statistics = _normalise(u, ln_weight, ln_bias, eps)
    return n.view(x.shape), u.view(x.shape), statistics


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
    du, dg, dbeta = _normalise_bwd(dn.reshape(rows), u.view(rows), statistics, ln_weight, ln_bias)
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
    y, a = _mlp_fwd(x.to(dtype).reshape(rows), residual, w1, b1, w2, b2, gamma, drop_scale, act, recompute == 0)
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
    dx, *d_mlp = _mlp_bwd(dy.reshape(rows), x.to(dtype).reshape(rows), a, w1, b1, w2, b2, gamma, drop_scale, act)
    return dx.view(x.shape), *d_mlp
