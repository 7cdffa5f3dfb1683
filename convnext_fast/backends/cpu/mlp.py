"""LayerNorm and the pointwise MLP on rows of pixels: x86 kernels where supported, else ATen calls.

ATen works on rows in blocks whose hidden activations stay in the cache; the normalised activations are never saved.

P pixels, C channels, K hidden units, T the compute dtype, R the dtype of the residual stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import llvm_mlp
from .aten_layers import Mlp, Norm, activation, activation_and_bwd_, linear, row_blocks, sum_dtype
from .response_norm import ResponseNorm


def mlp_fwd(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm | None,
    mlp: Mlp,
    grn: ResponseNorm | None,
    drop_scale: Tensor | None,
    save_hidden: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = residual + drop_scale·γ·(grn(act(a))·w2ᵀ + b2), a = norm(x)·w1ᵀ + b1 if ``save_hidden``, and grn's norms.

    x: (P, C) in T; residual and y: (P, C) in R; drop_scale: (N,), each for P/N rows; a: (P, K) in T; norms: (N, K) in
    at least float32. ``overwrite``: y may be written over x, which saves the page faults of a large new tensor.
    """
    machine = None if residual is None else llvm_mlp.machine_for((x, residual), mlp, norm, grn)
    scale = row_scale(drop_scale, x)
    if machine is not None and llvm_mlp.forward_pays(len(x), mlp):
        return llvm_mlp.mlp_fwd(machine, x, residual, norm, mlp, grn, scale, save_hidden, overwrite)
    hidden, channels = mlp.w1.shape
    mlp, row_bytes, norms, into_weight = mlp.to(x.dtype), hidden * x.element_size(), None, False
    if grn is None:
        blocks = row_blocks(len(x), row_bytes)
    else:
        into_weight, norms = grn.pixels > channels, x.new_empty(len(x) // grn.pixels, hidden, dtype=sum_dtype(x.dtype))
        blocks = grn.blocks(len(x), row_bytes, alone=into_weight)
        if grn.beta is not None:
            mlp = mlp._replace(b2=torch.addmv(mlp.b2, mlp.w2, grn.beta.to(x.dtype)))
    like = x if residual is None else residual
    y = x if overwrite and x.dtype == like.dtype else torch.empty_like(like)
    saved = x.new_empty(len(x), hidden) if save_hidden else None
    for rows in blocks:
        n, own = x[rows] if norm is None else norm.forward(x[rows])[0], mlp
        if saved is None:
            h = linear(n, mlp.w1, mlp.b1, mlp.act)
        else:
            h = activation(torch.addmm(mlp.b1, n, mlp.w1.t(), out=saved[rows]), mlp.act)
        if grn is not None:
            h, own, norms[grn.samples(rows)] = grn.forward(h, mlp, into_weight)
        z = own.second(h, None if residual is None else residual[rows], None if scale is None else scale[rows])
        if len(blocks) == 1:
            return z.to(like.dtype), saved, norms
        y[rows] = z
    return y, saved, norms


def mlp_bwd(
    dy: Tensor,
    x: Tensor,
    a: Tensor | None,
    norm: Norm | None,
    mlp: Mlp,
    grn: ResponseNorm | None,
    drop_scale: Tensor | None,
    norms: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dg, dβ, dw1, db1, dw2, db2, dγ), then grn's dγ and dβ, for dy (P, C) in R and x (P, C) in T.

    a (P, K) and norms (N, K): as saved, or None to recompute them. dx: (P, C) in T, the others in at least float32.
    γ's gradient needs no z: for E = Σ_p dz' ⊗ h, with grn's β in it, and t = Σ_p dz', with dz' = drop_scale·dy, it is
    dγ = Σ_k w2∘E + b2·t; dw2 = γ∘E and db2 = γ·t.
    """
    scale = row_scale(drop_scale, x)
    machine = llvm_mlp.machine_for((dy, x, a), mlp, norm, grn)
    if machine is not None:
        return llvm_mlp.mlp_bwd(machine, dy, x, a, norm, mlp, grn, scale)
    dtype, wide, row_bytes = x.dtype, sum_dtype(x.dtype), len(mlp.w1) * x.element_size()
    original, mlp = mlp, mlp.to(dtype)
    dw1 = db1 = e = t = dg = dbeta = d_response = d_response_bias = d_gamma = None
    dx = torch.empty_like(x)
    # A block uses dh, a, h and da together. da is written over dh, and h over an a computed here, because the first use
    # of a new tensor costs page faults.
    blocks = row_blocks(len(x), 4 * row_bytes) if grn is None else grn.blocks(len(x), 3 * row_bytes)
    d_hidden = x.new_empty(blocks[0].stop, len(mlp.w1))
    hidden = None if a is None or grn is not None else torch.empty_like(d_hidden)
    for rows in blocks:
        n, *statistics = (x[rows],) if norm is None else norm.forward(x[rows])
        dz = dy[rows].to(dtype)
        if scale is not None:
            dz = dz * scale[rows]
        pre = linear(n, mlp.w1, mlp.b1) if a is None else a[rows]
        # PyTorch's BLAS is faster than oneDNN where nothing is fused and the weight is not transposed.
        dh = torch.mm(dz if mlp.gamma is None else (dz * mlp.gamma).to(dtype), mlp.w2, out=d_hidden[: len(n)])
        if grn is None:
            da, h = activation_and_bwd_(dh, pre, mlp.act, pre if hidden is None else hidden[: len(n)])
        else:
            h = activation(pre, mlp.act)
            dh, scaled, part = grn.backward(dh, h, None if norms is None else norms[grn.samples(rows)])
            da, _ = activation_and_bwd_(dh, pre, mlp.act, pre if a is None else h)
            h, d_response = scaled, plus(d_response, part)
        e, dw1 = plus_product(e, dz.t(), h), plus_product(dw1, da.t(), n)
        t, db1 = plus(t, dz.sum(0, dtype=wide)), plus(db1, da.sum(0, dtype=wide))
        dn = da @ mlp.w1
        if norm is not None:
            dn, d_weight, d_bias = norm.backward(dn, x[rows], *statistics)
            dg, dbeta = plus(dg, d_weight), plus(dbeta, d_bias)
        dx[rows] = dn
    if grn is not None and grn.beta is not None:
        e = torch.addr(e.to(wide), t, grn.beta.to(wide))
    db2 = t
    if mlp.gamma is not None:
        gamma = mlp.gamma.to(wide)
        d_gamma = torch.addcmul((original.w2 * e).sum(1), original.b2.to(wide), t)
        e, db2 = e.mul_(gamma[:, None]), t * gamma
    if grn is not None:
        d_response_bias = db2 @ original.w2.to(wide)
    return dx, dg, dbeta, dw1, db1, e, db2, d_gamma, d_response, d_response_bias


def plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """total + part, in place; the part itself if there is no total yet."""
    return part if total is None or part is None else total.add_(part)


def plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left·right in at least float32.

    Products of bfloat16 sum in float32 and round once, as PyTorch's own weight gradients do; those of float16 stay
    float32, so that the sum, which is not yet scaled by γ, does not overflow.
    """
    if left.dtype == torch.float16:
        left, right = left.float(), right.float()
    if total is not None and total.dtype == left.dtype:
        return total.addmm_(left, right)
    return plus(total, (left @ right).to(sum_dtype(left.dtype)))


def row_scale(drop_scale: Tensor | None, x: Tensor) -> Tensor | None:
    """The drop-path factor of each row: (P, 1) in T."""
    if drop_scale is None:
        return None
    samples = drop_scale.shape[0]
    return drop_scale.to(x.dtype)[:, None].expand(samples, x.shape[0] // max(samples, 1)).reshape(-1, 1)
