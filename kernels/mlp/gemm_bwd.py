"""Backward of wide blocks, and of float32: three GEMMs with h and da in memory, s the drop-path factor of a sample.

    a = rstd·(u·w1gᵀ − μ·r) + b1g    dh = s·q·(dy·w2g)    h' = s·act(a)    da' = rstd·dh·act′(a)   _hidden_grad_kernel
    du = da'·w1g − m1 − x̂·m2                                                                       _input_grad_kernel
    D = da'ᵀ·u − Σ_p da'·μ    Eᵀ = h'ᵀ·dy    dz_sum = Σ_p s·dy                                     _weight_grad_kernel

r_k = Σ_c w1g[k, c]. LayerNorm costs no pass of its own: u and dy go to the matrix units as they are, rstd and s are
applied to the hidden activations, and LayerNorm's backward, du = rstd·(dx̂ − mean(dx̂) − x̂·mean(dx̂·x̂)) for dx̂ =
da·w1g, is the epilogue of its GEMM, because both means follow from what the first kernel holds:

    m1 = Σ_k da'_k·r_k / C = rstd·mean(dx̂)        m2 = Σ_k da'_k·(a_k − b1g_k) / C = rstd·mean(dx̂·x̂)

In float32 μ is subtracted from u as it is loaded, see gemm.py: a = rstd·((u − μ)·w1gᵀ) + b1g and
D = da'ᵀ·(u − μ).

With the global response norm dh is its gradient at h, and GRN(h) replaces h in E (``grn_bwd.py``).

The means and the sums over pixels are partial sums, of a tile each, that a later launch adds up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import activation_and_grad
from ..autotuning import SHARES, Share, fastest
from ..folding import Sums
from ..gelu import gelu_form
from ..integers import cdiv
from ..launching import launch
from ..statistics import merge_statistics
from ..targets import target_of
from .gemm import load_tile, tile_of_program
from .grn import bias_at, count_row_tiles, factors_at, row_tiles, rows_of_tile
from .tuning import dot_precision, norm_blocks
from .tuning_bwd import hidden_grad_config, input_grad_config, weight_grad_config


@triton.jit
def hidden_tile(
    u_ptr, stats_ptr, dy_ptr, drop_scale_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, first, rows, rows_ok, n, P,
    rows_per_sample, depth, eps,
    C: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(a, s·q·(dy·w2g), s, μ, rstd) of the ``rows`` from ``first`` on, at the hidden units ``n``.

    a is loaded or recomputed; ``depth`` is C, see ``dot_rows``. What does not exist is 0, and s then 1.
    """
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    EARLY: tl.constexpr = NB > 0 and dtype == tl.float32
    n_ok = n < K
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = tl.zeros((BLOCK_M,), tl.float32)
    if EARLY:
        mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok, P, C, eps, CB, NB)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        dy = load_tile(dy_ptr + first * C, rows, rows_ok, k, False, C, BLOCK_K).to(dtype)
        w2 = load_tile(w2_ptr, k, k < C, n, C % BLOCK_K == 0, K, BLOCK_N)
        dh = tl.dot(dy, w2, dh, input_precision=PRECISION)
        if a_ptr is None:
            u = load_tile(u_ptr + first * C, rows, rows_ok, k, False, C, BLOCK_K)
            if EARLY:
                u -= mean[:, None]
            w1 = load_tile(w1_ptr, n, n_ok, k, K % BLOCK_N == 0, C, BLOCK_K)
            a = tl.dot(u, w1.T, a, input_precision=PRECISION)
    bias = tl.load(b1_ptr + n, mask=n_ok, other=0.0)
    if NB > 0 and not EARLY:
        mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok, P, C, eps, CB, NB)
    if a_ptr is not None:
        at = rows[:, None] * K + n[None, :]
        a = tl.load(a_ptr + first * K + at, mask=rows_ok[:, None] & n_ok[None, :], other=0.0).to(tl.float32)
    elif NB > 0:
        if not EARLY:
            row_sum = tl.load(b1_ptr + K + n, mask=n_ok, other=0.0)
            a = tl.fma((-mean)[:, None], row_sum[None, :], a)
        a = tl.fma(a, rstd[:, None], bias[None, :])
    else:
        a += bias[None, :]
    if UNIT:
        dh *= tl.load(b1_ptr + 2 * K)
    s = tl.full((BLOCK_M,), 1.0, tl.float32)
    if drop_scale_ptr is not None:
        s = tl.load(drop_scale_ptr + (first + rows) // rows_per_sample, mask=rows_ok, other=0.0).to(tl.float32)
        dh *= s[:, None]
    return a, dh, s, mean, rstd


@triton.jit(do_not_specialize=["P", "rows_per_sample"])
def _hidden_grad_kernel(
    u_ptr, stats_ptr, dy_ptr, drop_scale_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, factors_ptr, grn_bias_ptr,
    h_ptr, da_ptr, db1_ptr, centre_ptr, means_ptr, mu_ptr, P, rows_per_sample, depth, eps,
    C: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, UNIT: tl.constexpr, ACT: tl.constexpr,
    FORM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """UNIT: b1 holds q. h', da': (P, K); factors (N, 2, K) of GRN or None.

    Partial sums: db1 and, where there are statistics, centre (row tiles, K), and means (column tiles, P, 2), of C·m1
    and C·m2. In float32 there is mu (P,), μ, instead of centre.
    """
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    tiles = count_row_tiles(P, rows_per_sample, factors_ptr is not None, BLOCK_M)
    tile_m, tile_n = tile_of_program(tiles, K, BLOCK_N, 8)
    rows = tl.arange(0, BLOCK_M)
    first = tile_m.to(tl.int64) * BLOCK_M
    first, rows_ok, sample = rows_of_tile(first, rows, P, rows_per_sample, factors_ptr is not None, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < K
    a, dh, s, mean, rstd = hidden_tile(
        u_ptr, stats_ptr, dy_ptr, drop_scale_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, first, rows, rows_ok, n, P,
        rows_per_sample, depth, eps, C, K, CB, NB, UNIT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if mu_ptr is not None:  # noqa: SIM102 (decided at compile time)
        if tile_n == 0:
            tl.store(mu_ptr + first + rows, mean, mask=rows_ok)
    at = rows[:, None] * K + n[None, :]
    ok = rows_ok[:, None] & n_ok[None, :]
    if NB > 0:
        bias = tl.load(b1_ptr + n, mask=n_ok, other=0.0)
        row_sum = tl.load(b1_ptr + K + n, mask=n_ok, other=0.0)
    h, slope = activation_and_grad(a, ACT, FORM)
    if factors_ptr is not None:
        scale, pull = factors_at(factors_ptr, sample, n, K)
        h = tl.where(rows_ok[:, None], h, 0.0)
        dh = tl.fma(dh, scale[None, :], h * pull[None, :])
        h = tl.fma(h, scale[None, :], bias_at(grn_bias_ptr, n, K)[None, :])
    da = dh * slope
    if drop_scale_ptr is not None:
        h *= s[:, None]
    tl.store(h_ptr + first * K + at, h.to(dtype), mask=ok)
    tl.store(db1_ptr + tile_m.to(tl.int64) * K + n, tl.sum(da, axis=0), mask=n_ok)
    if NB > 0:
        da *= rstd[:, None]
    tl.store(da_ptr + first * K + at, da.to(dtype), mask=ok)
    if NB > 0:
        da = da.to(dtype).to(tl.float32)
        if mu_ptr is None:
            tl.store(centre_ptr + tile_m.to(tl.int64) * K + n, tl.sum(da * mean[:, None], axis=0), mask=n_ok)
        means_ptr += (tile_n.to(tl.int64) * P + first + rows) * 2
        tl.store(means_ptr, tl.sum(da * row_sum[None, :], axis=1), mask=rows_ok)
        tl.store(means_ptr + 1, tl.sum(da * (a - bias[None, :]), axis=1), mask=rows_ok)


@triton.jit(do_not_specialize=["P"])
def _input_grad_kernel(
    da_ptr, w1_ptr, u_ptr, stats_ptr, means_ptr, du_ptr, P, depth, tiles, eps,
    C: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """du: (P, C); means: (tiles, P, 2); ``depth`` is K."""
    tile_m, tile_n = tile_of_program(tl.cdiv(P, BLOCK_M), C, BLOCK_N, 8)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    rows_ok = first + rows < P
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        da = load_tile(da_ptr + first * K, rows, rows_ok, k, False, K, BLOCK_K)
        w1 = load_tile(w1_ptr, k, k < K, n, K % BLOCK_K == 0, C, BLOCK_N)
        dx = tl.dot(da, w1, dx, input_precision=PRECISION)
    at = first * C + rows[:, None] * C + n[None, :]
    ok = rows_ok[:, None] & (n < C)[None, :]
    if NB > 0:
        mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok, P, C, eps, CB, NB)
        total = tl.zeros((BLOCK_M,), tl.float32)
        along = tl.zeros((BLOCK_M,), tl.float32)
        for t in range(tiles):
            pair = means_ptr + ((tl.zeros((), tl.int64) + t) * P + first + rows) * 2
            total += tl.load(pair, mask=rows_ok, other=0.0)
            along += tl.load(pair + 1, mask=rows_ok, other=0.0)
        along *= rstd * (1.0 / C)
        u = tl.load(u_ptr + at, mask=ok, other=0.0).to(tl.float32)
        dx -= tl.fma(u - mean[:, None], along[:, None], (total * (1.0 / C))[:, None])
    tl.store(du_ptr + at, dx.to(du_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _product(
    left_ptr, right_ptr, mu_ptr, out_ptr, first, share, P, tile_k, tile_c, dtype: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the tile (tile_k, tile_c) of leftᵀ·(right − mu), (K, C), over the ``share`` pixels from ``first`` on.

    mu: (P,) or None.
    """
    k = tile_k * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile_c * BLOCK_N + tl.arange(0, BLOCK_N)
    pixels = tl.arange(0, BLOCK_K)
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, share, BLOCK_K):
        pixel = first + start
        pixels_ok = pixel + pixels < P
        left = load_tile(left_ptr + pixel * K, pixels, pixels_ok, k, False, K, BLOCK_M)
        right = load_tile(right_ptr + pixel * C, pixels, pixels_ok, c, False, C, BLOCK_N).to(dtype)
        if mu_ptr is not None:
            right -= tl.load(mu_ptr + pixel + pixels, mask=pixels_ok, other=0.0)[:, None]
        out = tl.dot(left.T, right, out, input_precision=PRECISION)
    at = k[:, None].to(tl.int64) * C + c[None, :]
    tl.store(out_ptr + at, out, mask=(k < K)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["P", "rows_per_sample", "share"])
def _weight_grad_kernel(
    da_ptr, u_ptr, mu_ptr, h_ptr, dy_ptr, drop_scale_ptr, products_ptr, dz_ptr, P, rows_per_sample, share,
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (programs, shares): of a share, the column tiles of dz_sum, then the tiles of D, then those of Eᵀ.

    products: (2, shares, K, C); dz: (shares, C).
    """
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    columns: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = columns * ((K + BLOCK_M - 1) // BLOCK_M)
    split = tl.program_id(1).to(tl.int64)
    first = split * share
    tile = tl.program_id(0) - columns
    if tile < 0:
        c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        pixels = tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        for start in range(0, share, BLOCK_K):
            pixel = first + start
            pixels_ok = pixel + pixels < P
            dy = load_tile(dy_ptr + pixel * C, pixels, pixels_ok, c, False, C, BLOCK_N).to(tl.float32)
            if drop_scale_ptr is not None:
                at = (pixel + pixels) // rows_per_sample
                dy *= tl.load(drop_scale_ptr + at, mask=pixels_ok, other=0.0).to(tl.float32)[:, None]
            total += dy
        tl.store(dz_ptr + split * C + c, tl.sum(total, axis=0), mask=c < C)
    elif tile < tiles:
        _product(
            da_ptr, u_ptr, mu_ptr, products_ptr + split * K * C, first, share, P, tile // columns, tile % columns,
            dtype, C, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        tile -= tiles
        out_ptr = products_ptr + (tl.num_programs(1) + split) * K * C
        _product(
            h_ptr, dy_ptr, None, out_ptr, first, share, P, tile // columns, tile % columns,
            dtype, C, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def gemm_mlp_bwd(dy, u, stats, a, w1g, b1g, w2g, drop_scale, eps, act, factors=None) -> tuple[Tensor, Sums]:
    """``mlp_bwd``, whose arguments it takes, with h and da in memory, whatever the width; P > 0."""
    P, C = u.shape
    K = w1g.shape[0]
    CB, NB = norm_blocks(stats, C, u.dtype)
    samples = None if factors is None else factors.values.shape[0]
    per_sample = P // (samples or (1 if drop_scale is None else drop_scale.numel()))
    target, shape = target_of(u), {"C": C, "K": K, "PRECISION": dot_precision(u)}

    def partial(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=u.device)

    config = hidden_grad_config(C, u.dtype, target, per_sample if samples else None)
    rows, columns = row_tiles(P, samples, config.BLOCK_M), cdiv(K, config.BLOCK_N)
    h, da = torch.empty((2, P, K), dtype=u.dtype, device=u.device)
    db1, centre, means, mu = partial(rows, K), None, None, None
    if stats is not None:
        means = partial(columns, P, 2)
        centre, mu = (None, partial(P)) if u.dtype == torch.float32 else (partial(rows, K), None)
    launch(
        _hidden_grad_kernel, (rows * columns,),
        u, stats, dy, drop_scale, a, w1g, b1g, w2g, *(factors or (None, None)), h, da, db1, centre, means, mu,
        P, per_sample, C, eps,
        CB=CB, NB=NB, UNIT=b1g.shape[0] == 3, ACT=act, FORM=gelu_form(u.dtype), **shape, **config.__dict__,
    )  # fmt: skip
    du = torch.empty_like(u)
    config = input_grad_config(C, u.dtype, target)
    launch(
        _input_grad_kernel, (cdiv(P, config.BLOCK_M) * cdiv(C, config.BLOCK_N),),
        da, w1g, u, stats, means, du, P, K, columns, eps, CB=CB, NB=NB, **shape, **config.__dict__,
    )  # fmt: skip
    config, share = weight_grad_config(P, C, K, u.dtype, target, dy.dtype != u.dtype)

    def weights(part: Share) -> Sums:
        pixels = part.of(share, config.BLOCK_K)
        splits, tiles = cdiv(P, pixels), cdiv(C, config.BLOCK_N)
        products, dz = partial(2, splits, K, C), partial(splits, C)
        launch(
            _weight_grad_kernel, (tiles * (1 + 2 * cdiv(K, config.BLOCK_M)), splits),
            da, u, mu, h, dy, drop_scale, products, dz, P, per_sample, pixels, **shape, **config.__dict__,
        )  # fmt: skip
        return Sums(products, db1, centre, dz)

    return du, weights(fastest(_weight_grad_kernel, weights, SHARES, u, P, (C, K, dy.dtype)))
