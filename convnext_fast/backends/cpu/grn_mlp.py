"""`mlp.mlp_fwd` and `mlp_bwd` with ConvNeXt V2's global response norm between the linear layers: kernels for x86 where
they serve (`llvm_grn_mlp`), else ATen calls.

For h = act(n·w1ᵀ + b1), its norms G over the pixels of each sample, γ and β of the global response norm:

    N = G/(mean_k G + ε)      s = 1 + γ·N      y = residual + drop_scale·((h·s + β)·w2ᵀ + b2)

β goes into b2, and s into h or, where a sample has more pixels than w2 has rows, into w2. With z's gradient dz,
d = dz·w2 and R = Σ_p d·h, a sum for each sample:

    dβ = Σ_p d = (Σ_p dz)·w2      dγ = Σ_n N·R      dG = (γ·R − mean_k(γ·R·N))/(mean_k G + ε)      dh = d·s + h·dG/G

Samples are taken in blocks whose hidden activations stay in the cache. P pixels, C channels, K hidden units, T the
compute dtype, R the dtype of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.weights import GRN_EPS
from . import llvm_grn_mlp, llvm_mlp
from .aten_layers import Mlp, Norm, activation, activation_and_bwd_, linear, sum_dtype
from .mlp import plus, plus_product, row_scale

_CACHE_BYTES = 24 << 20
"""Of the hidden activations of a block of samples."""


def norms_of(h: Tensor) -> Tensor:
    """G of hidden units (N, H·W, K), in at least float32; `torch.linalg.vector_norm` takes ten times as long."""
    return h.to(sum_dtype(h.dtype)).square().sum(1).sqrt_()


class ResponseNorm(NamedTuple):
    """A global response norm: γ and β (K,), β None where it is folded away; pixels: of a sample."""

    gamma: Tensor
    beta: Tensor | None
    pixels: int

    def relative(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """N, and its denominator, of G."""
        below = norms.mean(1, keepdim=True) + GRN_EPS
        return norms / below, below

    def factors(self, norms: Tensor) -> Tensor:
        """s of G."""
        return 1 + self.gamma * self.relative(norms)[0]

    def blocks(self, rows: int, row_bytes: int, alone: bool) -> Iterator[tuple[slice, slice]]:
        """Blocks of samples and of their rows; one that is empty if there are no rows. ``alone``: of one sample each.

        row_bytes: of the hidden activations of a row.
        """
        count = rows // self.pixels
        size = 1 if alone else max(1, _CACHE_BYTES // (self.pixels * row_bytes))
        for start in range(0, max(count, 1), size):
            stop = min(start + size, count)
            yield slice(start, stop), slice(start * self.pixels, stop * self.pixels)


def grn_mlp_fwd(
    x: Tensor,
    residual: Tensor,
    norm: Norm,
    mlp: Mlp,
    grn: ResponseNorm,
    drop_scale: Tensor | None,
    save_hidden: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, a = norm(x)·w1ᵀ + b1 if ``save_hidden``, and G (N, K) in at least float32; arguments as of `mlp.mlp_fwd`."""
    scale, machine = row_scale(drop_scale, x), llvm_grn_mlp.machine_for((x, residual), mlp, norm, grn)
    if machine is not None and llvm_mlp.forward_pays(len(x), mlp):
        return llvm_grn_mlp.grn_mlp_fwd(machine, x, residual, norm, mlp, grn, scale, save_hidden)
    dtype, (hidden, channels), pixels = x.dtype, mlp.w1.shape, grn.pixels
    mlp = mlp.to(dtype)
    if grn.beta is not None:
        mlp = mlp._replace(b2=torch.addmv(mlp.b2, mlp.w2, grn.beta.to(dtype)))
    y = torch.empty_like(residual)
    saved = x.new_empty(len(x), hidden) if save_hidden else None
    norms = x.new_empty(len(x) // pixels, hidden, dtype=sum_dtype(dtype))
    scales_w2 = pixels > channels
    for samples, rows in grn.blocks(len(x), hidden * x.element_size(), scales_w2):
        n, own = norm.forward(x[rows])[0], mlp
        if saved is None:
            h = linear(n, mlp.w1, mlp.b1, mlp.act)
        else:
            h = activation(torch.addmm(mlp.b1, n, mlp.w1.t(), out=saved[rows]), mlp.act)
        norms[samples] = norms_of(h.view(-1, pixels, hidden))
        s = grn.factors(norms[samples])
        if scales_w2 and len(h):
            own = mlp._replace(w2=(mlp.w2 * s).to(dtype))
        else:
            h = (h.view(-1, pixels, hidden) * s[:, None]).to(dtype).view(h.shape)
        y[rows] = own.second(h, residual[rows], None if scale is None else scale[rows])
    return y, saved, norms


def grn_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    a: Tensor | None,
    norms: Tensor | None,
    norm: Norm,
    mlp: Mlp,
    grn: ResponseNorm,
    drop_scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """As `mlp.mlp_bwd`, then dγ and dβ of the global response norm; a and norms as saved, or None to compute them."""
    scale, machine = row_scale(drop_scale, x), llvm_grn_mlp.machine_for((dy, x, a), mlp, norm, grn)
    if machine is not None:
        return llvm_grn_mlp.grn_mlp_bwd(machine, dy, x, a, norm, mlp, grn, scale)
    dtype, wide, hidden, pixels = x.dtype, sum_dtype(x.dtype), len(mlp.w1), grn.pixels
    original, mlp = mlp, mlp.to(dtype)
    dx = torch.empty_like(x)
    dw1 = db1 = e = t = dg = dbeta = d_gamma = None
    for samples, rows in grn.blocks(len(x), 3 * hidden * x.element_size(), False):
        n, *statistics = norm.forward(x[rows])
        dz = dy[rows].to(dtype)
        if scale is not None:
            dz = dz * scale[rows]
        pre = linear(n, mlp.w1, mlp.b1) if a is None else a[rows]
        flat = activation(pre, mlp.act)
        h = flat.to(wide).view(-1, pixels, hidden)
        d = ((dz if mlp.gamma is None else (dz * mlp.gamma).to(dtype)) @ mlp.w2).to(wide).view(h.shape)
        g = norms_of(h) if norms is None else norms[samples]
        (relative, below), r = grn.relative(g), (d * h).sum(1)
        d_relative, s = grn.gamma * r, grn.factors(g)
        d_norms = (d_relative - (d_relative * relative).mean(1, keepdim=True)) / below
        slopes = torch.where(g > 0, d_norms / g, 0.0)
        dh = d.mul_(s[:, None]).addcmul_(h, slopes[:, None]).to(dtype).view(flat.shape)
        scaled = (h * s[:, None]).to(dtype).view(flat.shape)
        da, _ = activation_and_bwd_(dh, pre, mlp.act, pre if a is None else flat)
        e, dw1 = plus_product(e, dz.t(), scaled), plus_product(dw1, da.t(), n)
        t, db1 = plus(t, dz.sum(0, dtype=wide)), plus(db1, da.sum(0, dtype=wide))
        d_gamma = plus(d_gamma, (relative * r).sum(0))
        dn, d_weight, d_bias = norm.backward(da @ mlp.w1, x[rows], *statistics)
        dg, dbeta = plus(dg, d_weight), plus(dbeta, d_bias)
        dx[rows] = dn
    e = e.to(wide) if grn.beta is None else torch.addr(e.to(wide), t, grn.beta.to(wide))
    w2, layer_scale = original.w2.to(wide), mlp.gamma
    d_layer_scale = None
    db2 = t
    if layer_scale is not None:
        layer_scale = layer_scale.to(wide)
        d_layer_scale = torch.addcmul((w2 * e).sum(1), original.b2.to(wide), t)
        e, db2 = e * layer_scale[:, None], t * layer_scale
    return dx, dg, dbeta, dw1, db1, e, db2, d_layer_scale, d_gamma, db2 @ w2
