"""The global response norm of ConvNeXt V2, backward: sums over the pixels, and what follows from them.

With dg = dz'·w2 the gradient at GRN(h) = f·h + bias, of a sample and a hidden unit k:

    r_k = Σ_p dg·h      dN_k = weight_k·r_k      m = mean G + ε
    dG_k = dN_k/m − Σ_j dN_j·G_j/(K·m²)           dh = dg·f + h·t,  t_k = dG_k/G_k, 0 where G_k is 0
    dweight_k = Σ_n N_k·r_k                       dbias_k = Σ_n Σ_p dg

One pass over the pixels makes h and dg and writes partial sums of h², dg·h and dg in float32; one program per sample
then makes f, t and the sample's part of the parameters' gradients. The kernels of the MLP's backward make h and dg
again: 2 products more, and 2 units of P·C elements to read, where keeping both in memory would move 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import activation
from ..dtypes import dot_precision
from ..gelu import gelu_form
from ..integers import cdiv
from ..launching import launch
from ..targets import target_of
from .gemm import halves, tile_of_program
from .grn import EPS, Factors, Grn, count_row_tiles, few_tiles, row_tiles, rows_of_tile, sum_of_tiles
from .hidden_grad import finish_hidden, hidden_products
from .tuning import norm_blocks
from .tuning_bwd import hidden_grad_config


@triton.jit
def _store_sums(
    a, dg, a_ptr, b1_ptr, mean, rstd, sums_ptr, rows, rows_ok, n,
    K: tl.constexpr, SUBTRACTED: tl.constexpr, UNIT: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Finish the columns ``n`` of the products and store their sums over the rows."""
    a, dg = finish_hidden(a, dg, a_ptr, b1_ptr, mean, rstd, rows, rows_ok, n, K, SUBTRACTED, UNIT)
    h = tl.where(rows_ok[:, None], activation(a, ACT, FORM), 0.0)
    sums_ptr += n
    tl.store(sums_ptr, tl.sum(h * h, axis=0), mask=n < K)
    tl.store(sums_ptr + K, tl.sum(dg * h, axis=0), mask=n < K)
    tl.store(sums_ptr + 2 * K, tl.sum(dg, axis=0), mask=n < K)


@triton.jit(do_not_specialize=["P", "rows_per_sample"])
def _grn_sums_kernel(
    u_ptr, stats_ptr, dz_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, sums_ptr, P, rows_per_sample, depth, eps,
    C: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, UNIT: tl.constexpr, ACT: tl.constexpr,
    FORM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums: (row tiles, 3, K), of h², dg·h and dg."""
    SUBTRACTED: tl.constexpr = u_ptr.dtype.element_ty == tl.float32
    tiles = count_row_tiles(P, rows_per_sample, True, BLOCK_M)
    tile_m, tile_n = tile_of_program(tl.program_id(0), tiles, K, BLOCK_N, 8)
    rows = tl.arange(0, BLOCK_M)
    first = tile_m.to(tl.int64) * BLOCK_M
    first, rows_ok, _ = rows_of_tile(first, rows, P, rows_per_sample, True, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a, dg, mean, rstd = hidden_products(
        u_ptr, stats_ptr, dz_ptr, w1_ptr, w2_ptr, first, rows, rows_ok, n, P, depth, eps,
        C, K, CB, NB, a_ptr is not None, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    sums_ptr += tile_m.to(tl.int64) * (3 * K)
    if a_ptr is not None:
        a_ptr += first * K
    if BLOCK_N >= 128:
        a, right_a = halves(a, BLOCK_M, BLOCK_N)
        dg, right_dg = halves(dg, BLOCK_M, BLOCK_N)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _store_sums(a, dg, a_ptr, b1_ptr, mean, rstd, sums_ptr, rows, rows_ok, n, K, SUBTRACTED, UNIT, ACT, FORM)
        n += BLOCK_N // 2
        a, dg = right_a, right_dg
    _store_sums(a, dg, a_ptr, b1_ptr, mean, rstd, sums_ptr, rows, rows_ok, n, K, SUBTRACTED, UNIT, ACT, FORM)


@triton.jit
def _grn_factors_kernel(
    sums_ptr, weight_ptr, factors_ptr, grads_ptr, K: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (N,). sums: (N, TILES, 3, K); factors: (N, 2, K), f and t; grads: (N, 2, K), of weight and bias."""
    sample = tl.program_id(0).to(tl.int64)
    sums_ptr += sample * (TILES * 3 * K)
    factors_ptr += sample * (2 * K)
    grads_ptr += sample * (2 * K)
    total = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        norm = tl.sqrt(sum_of_tiles(sums_ptr, k, K, TILES, 3 * K))
        total += norm
        along += weight * sum_of_tiles(sums_ptr + K, k, K, TILES, 3 * K) * norm
    inverse = 1.0 / (tl.sum(total, axis=0) * (1.0 / K) + EPS)
    shift = tl.sum(along, axis=0) * inverse * inverse * (1.0 / K)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        norm = tl.sqrt(sum_of_tiles(sums_ptr, k, K, TILES, 3 * K))
        product = sum_of_tiles(sums_ptr + K, k, K, TILES, 3 * K)
        pull = tl.where(norm > 0.0, (weight * product * inverse - shift) / tl.where(norm > 0.0, norm, 1.0), 0.0)
        tl.store(factors_ptr + k, tl.fma(weight * inverse, norm, 1.0), mask=k < K)
        tl.store(factors_ptr + K + k, pull, mask=k < K)
        tl.store(grads_ptr + k, norm * inverse * product, mask=k < K)
        tl.store(grads_ptr + K + k, sum_of_tiles(sums_ptr + 2 * K, k, K, TILES, 3 * K), mask=k < K)


def grn_factors(
    dz: Tensor,
    u: Tensor,
    stats: Tensor | None,
    a: Tensor | None,
    w1g: Tensor,
    b1g: Tensor,
    w2g: Tensor,
    eps: float,
    act: str,
    grn: Grn,
) -> tuple[Factors, Tensor]:
    """What the MLP's backward needs of GRN, and (N, 2, K) float32 that add up to dweight and dbias; P > 0.

    dz of ``output_grad``; the other arguments of ``mlp_bwd``.
    """
    P, C = u.shape
    K = w1g.shape[0]
    CB, NB = norm_blocks(stats, C, u.dtype)
    config = hidden_grad_config(C, u.dtype, target_of(u), P // grn.samples)
    tiles = row_tiles(P, grn.samples, config.BLOCK_M)
    sums = u.new_empty((grn.samples, tiles // grn.samples, 3, K), dtype=torch.float32)
    launch(
        _grn_sums_kernel, (tiles * cdiv(K, config.BLOCK_N),),
        u, stats, dz, a, w1g, b1g, w2g, sums, P, P // grn.samples, C, eps,
        C=C, K=K, CB=CB, NB=NB, UNIT=b1g.shape[0] == 3, ACT=act, FORM=gelu_form(u.dtype),
        PRECISION=dot_precision(u.dtype), **config.__dict__,
    )  # fmt: skip
    sums = few_tiles(sums)
    factors, grads = u.new_empty((2, grn.samples, 2, K), dtype=torch.float32)
    launch(
        _grn_factors_kernel, (grn.samples,), sums, grn.weight, factors, grads, K=K, TILES=sums.shape[1], BLOCK=512
    )  # fmt: skip
    return Factors(factors, grn.bias), grads
