"""Backward of wide blocks, and of float32: three GEMMs with h and da in memory.

    dz' = s·dy, dz_sum = Σ_p dz'                                                                    output_grad.py
    a = rstd·(u·w1gᵀ − μ·r) + b1g    dh = q·(dz'·w2g)    h = act(a)    da' = rstd·dh·act′(a)        hidden_grad.py
    du = da'·w1g − m1 − x̂·m2                                                                       _input_grad_kernel
    D = da'ᵀ·u − Σ_p da'·μ    Eᵀ = hᵀ·dz'                                                          _weight_grad_kernel

LayerNorm's backward is the epilogue of the second product: its means m1 and m2 come with the first. In float32 μ is
subtracted from u as it is loaded, D = da'ᵀ·(u − μ). With the global response norm GRN(h) replaces h in E.

The means and the sums over pixels are partial sums, one per tile, that a later launch adds up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autotuning import SHARES, Share, fastest
from ..dtypes import dot_precision
from ..folding import Sums
from ..integers import cdiv
from ..launching import launch
from ..statistics import merge_statistics
from ..targets import target_of
from .gemm import load_tile, tile_of_program
from .grn import Grn
from .grn_bwd import grn_factors
from .hidden_grad import hidden_grad
from .output_grad import output_grad
from .tuning import norm_blocks
from .tuning_bwd import input_grad_config, weight_grad_config


@triton.jit(do_not_specialize=["P"])
def _input_grad_kernel(
    da_ptr, w1_ptr, u_ptr, stats_ptr, means_ptr, du_ptr, P, depth, tiles, eps,
    C: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """du: (P, C); means: (tiles, P, 2); ``depth`` is K."""
    tile_m, tile_n = tile_of_program(tl.program_id(0), tl.cdiv(P, BLOCK_M), C, BLOCK_N, 8)
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
def product_over_pixels(
    left_ptr, right_ptr, mu_ptr, first, share, P, k, c,
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """leftᵀ·(right − mu) of the ``share`` pixels from ``first`` on, at the BLOCK_M columns k and the BLOCK_N columns c.

    left: (P, K); right: (P, C); mu: (P,) or None.
    """
    pixels = tl.arange(0, BLOCK_K)
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, share, BLOCK_K):
        pixel = first + start
        pixels_ok = pixel + pixels < P
        left = load_tile(left_ptr + pixel * K, pixels, pixels_ok, k, False, K, BLOCK_M)
        right = load_tile(right_ptr + pixel * C, pixels, pixels_ok, c, False, C, BLOCK_N)
        if mu_ptr is not None:
            right -= tl.load(mu_ptr + pixel + pixels, mask=pixels_ok, other=0.0)[:, None]
        out = tl.dot(left.T, right, out, input_precision=PRECISION)
    return out


@triton.jit(do_not_specialize=["P", "share"])
def _weight_grad_kernel(
    da_ptr, u_ptr, mu_ptr, h_ptr, dz_ptr, products_ptr, P, share,
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (programs, shares): of a share, the tiles of D, then those of Eᵀ. products: (2, shares, K, C)."""
    columns: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = columns * ((K + BLOCK_M - 1) // BLOCK_M)
    split = tl.program_id(1).to(tl.int64)
    first = split * share
    tile = tl.program_id(0) % tiles
    k = tile // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(0) < tiles:
        out = product_over_pixels(
            da_ptr, u_ptr, mu_ptr, first, share, P, k, c, C, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        products_ptr += tl.num_programs(1).to(tl.int64) * K * C
        out = product_over_pixels(
            h_ptr, dz_ptr, None, first, share, P, k, c, C, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    at = split * K * C + k[:, None].to(tl.int64) * C + c[None, :]
    tl.store(products_ptr + at, out, mask=(k < K)[:, None] & (c < C)[None, :])


def gemm_mlp_bwd(dy, u, stats, a, w1g, b1g, w2g, drop_scale, eps, act, grn: Grn | None = None) -> tuple[Tensor, Sums]:
    """``mlp_bwd`` with the same arguments, with h and da in memory, for any width; P > 0."""
    P, C = u.shape
    K = w1g.shape[0]
    CB, NB = norm_blocks(stats, C, u.dtype)
    target, shape = target_of(u), {"C": C, "K": K, "PRECISION": dot_precision(u.dtype)}
    dz, dz_sum = output_grad(dy, drop_scale, u.dtype)
    factors, grads = (None, None) if grn is None else grn_factors(dz, u, stats, a, w1g, b1g, w2g, eps, act, grn)
    h, da, db1, centre, means, mu = hidden_grad(dz, u, stats, a, w1g, b1g, w2g, eps, act, factors)
    du = u.new_empty(u.shape)
    config = input_grad_config(C, u.dtype, target)
    columns = 0 if means is None else means.shape[0]
    launch(
        _input_grad_kernel, (cdiv(P, config.BLOCK_M) * cdiv(C, config.BLOCK_N),),
        da, w1g, u, stats, means, du, P, K, columns, eps, CB=CB, NB=NB, **shape, **config.__dict__,
    )  # fmt: skip
    config, share = weight_grad_config(P, C, K, u.dtype, target)

    def weights(part: Share) -> Sums:
        pixels = part.of(share, config.BLOCK_K)
        splits, tiles = cdiv(P, pixels), cdiv(C, config.BLOCK_N)
        products = u.new_empty((2, splits, K, C), dtype=torch.float32)
        launch(
            _weight_grad_kernel, (2 * tiles * cdiv(K, config.BLOCK_M), splits),
            da, u, mu, h, dz, products, P, pixels, **shape, **config.__dict__,
        )  # fmt: skip
        return Sums(products, db1, centre, dz_sum, grads)

    return du, weights(fastest(_weight_grad_kernel, weights, SHARES, u, P, (C, K)))
