"""LayerNorm and the pointwise MLP on rows of pixels: kernels for x86 where they serve (`llvm_mlp`), else ATen calls.

ATen works on rows in blocks whose hidden activations stay in the cache; the normalised activations are never saved.

P pixels, C channels, K hidden units, T the compute dtype, R the dtype of the residual stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import llvm_mlp
from .aten_layers import Mlp, Norm, activation, activation_and_bwd_, linear, sum_dtype
from .row_blocks import row_blocks


def mlp_fwd(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm | None,
    mlp: Mlp,
    drop_scale: Tensor | None,
    save_hidden: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = residual + drop_scale·γ·(act(a)·w2ᵀ + b2), and a = norm(x)·w1ᵀ + b1 if ``save_hidden``.

    x: (P, C) in T; residual and y: (P, C) in R; drop_scale: (N,), for P/N rows each; a: (P, K) in T. ``overwrite``: y
    may take the place of x, which saves the page faults of a large new tensor.
    """
    machine = None if residual is None else llvm_mlp.machine_for((x, residual), mlp, norm)
    scale = row_scale(drop_scale, x)
    if machine is not None and llvm_mlp.forward_pays(len(x), mlp):
        return llvm_mlp.mlp_fwd(machine, x, residual, norm, mlp, scale, save_hidden, overwrite)
    mlp = mlp.to(x.dtype)
    blocks = row_blocks(x.shape[0], mlp.w1.shape[0] * x.element_size())
    like = x if residual is None else residual
    y = x if overwrite and x.dtype == like.dtype else torch.empty_like(like)
    saved = x.new_empty(x.shape[0], mlp.w1.shape[0]) if save_hidden else None
    for rows in blocks:
        n = x[rows] if norm is None else norm.forward(x[rows])[0]
        rest = None if residual is None else residual[rows], None if scale is None else scale[rows]
        if saved is None:
            z = mlp.forward(n, *rest)
        else:
            a = torch.addmm(mlp.b1, n, mlp.w1.t(), out=saved[rows])
            z = mlp.second(activation(a, mlp.act), *rest)
        if len(blocks) == 1:
            return z, saved
        y[rows] = z
    return y, saved


def mlp_bwd(
    dy: Tensor, x: Tensor, a: Tensor | None, norm: Norm | None, mlp: Mlp, drop_scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(dx, dg, dβ, dw1, db1, dw2, db2, dγ) for dy (P, C) in R, x (P, C) in T and a (P, K) or None to recompute it.

    dx: (P, C) in T, the others in at least float32. γ's gradient needs no z: for E = Σ_p dz' ⊗ h and t = Σ_p dz', with
    dz' = drop_scale·dy, it is dγ = Σ_k w2∘E + b2·t; dw2 = γ∘E and db2 = γ·t.
    """
    scale = row_scale(drop_scale, x)
    machine = llvm_mlp.machine_for((dy, x, a), mlp, norm)
    if machine is not None:
        return llvm_mlp.mlp_bwd(machine, dy, x, a, norm, mlp, scale)
    dtype, wide = x.dtype, sum_dtype(x.dtype)
    original, mlp = mlp, mlp.to(dtype)
    dw1 = db1 = e = t = dg = dbeta = None
    dx = torch.empty_like(x)
    # dh, a, h and da of a block are used together; da takes the place of dh, and h that of an a made here, for a new
    # tensor costs the page faults of its first use.
    blocks = row_blocks(x.shape[0], 4 * mlp.w1.shape[0] * x.element_size())
    d_hidden = x.new_empty(blocks[0].stop, mlp.w1.shape[0])
    hidden = None if a is None else torch.empty_like(d_hidden)
    for rows in blocks:
        n, *statistics = (x[rows],) if norm is None else norm.forward(x[rows])
        dz = dy[rows].to(dtype)
        if scale is not None:
            dz = dz * scale[rows]
        pre = linear(n, mlp.w1, mlp.b1) if a is None else a[rows]
        # PyTorch's BLAS is faster than oneDNN where nothing is fused and the weight is not transposed.
        dh = torch.mm(dz if mlp.gamma is None else (dz * mlp.gamma).to(dtype), mlp.w2, out=d_hidden[: n.shape[0]])
        da, h = activation_and_bwd_(dh, pre, mlp.act, pre if hidden is None else hidden[: n.shape[0]])
        e, dw1 = plus_product(e, dz.t(), h), plus_product(dw1, da.t(), n)
        t, db1 = plus(t, dz.sum(0, dtype=wide)), plus(db1, da.sum(0, dtype=wide))
        dn = da @ mlp.w1
        if norm is not None:
            dn, d_weight, d_bias = norm.backward(dn, x[rows], *statistics)
            dg, dbeta = plus(dg, d_weight), plus(dbeta, d_bias)
        dx[rows] = dn
    if mlp.gamma is None:
        return dx, dg, dbeta, dw1, db1, e, t, None
    gamma = mlp.gamma.to(wide)
    dgamma = torch.addcmul((original.w2 * e).sum(1), original.b2.to(wide), t)
    return dx, dg, dbeta, dw1, db1, e.mul_(gamma[:, None]), t * gamma, dgamma


def plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """total + part, in place; the part itself where there is no total yet."""
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
