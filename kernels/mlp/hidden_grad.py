"""The hidden activations and their gradient, of wide blocks and of float32: the first kernel of the backward.

    a = rstd·(u·w1gᵀ − μ·r) + b1g    h = act(a)    dh = q·(dz'·w2g)    da = dh·act′(a)    da' = rstd·da

r_k = Σ_c w1g[k, c], dz' the gradient at the MLP's output (``output_grad.py``). LayerNorm costs no pass of its own: u
goes to the matrix units as it is, rstd is applied to the hidden activations. Both means of LayerNorm's backward, du =
rstd·(dx̂ − mean(dx̂) − x̂·mean(dx̂·x̂)) for dx̂ = da·w1g, follow from what a tile holds:

    m1 = Σ_k da'_k·r_k / C = rstd·mean(dx̂)        m2 = Σ_k da'_k·(a_k − b1g_k) / C = rstd·mean(dx̂·x̂)

In float32 μ is subtracted from u as it is loaded, see gemm.py: a = rstd·((u − μ)·w1gᵀ) + b1g. With the global response
norm dh is its gradient at h, and GRN(h) is stored instead of h (``grn_bwd.py``).

The epilogue takes half of a tile's columns at a time: two whole products would leave it too few registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import activation_and_grad
from ..dtypes import dot_precision
from ..gelu import gelu_form
from ..integers import cdiv
from ..launching import launch
from ..statistics import merge_statistics
from ..targets import target_of
from .gemm import halves, load_tile, tile_of_program
from .grn import Factors, bias_at, count_row_tiles, factors_at, row_tiles, rows_of_tile
from .tuning import norm_blocks
from .tuning_bwd import hidden_grad_config


@triton.jit
def hidden_products(
    u_ptr, stats_ptr, dz_ptr, w1_ptr, w2_ptr, first, rows, rows_ok, n, P, depth, eps,
    C: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, SAVED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(u·w1gᵀ, dz'·w2g, μ, rstd) of the ``rows`` from ``first`` on, at the hidden units ``n``.

    SAVED: a lies in memory, and the first is zeros. In float32 it is (u − μ)·w1gᵀ. ``depth`` is C, see ``dot_tile``.
    """
    EARLY: tl.constexpr = NB > 0 and u_ptr.dtype.element_ty == tl.float32
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mean, rstd = None, None
    if EARLY:
        mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok, P, C, eps, CB, NB)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        dz = load_tile(dz_ptr + first * C, rows, rows_ok, k, False, C, BLOCK_K)
        w2 = load_tile(w2_ptr, k, k < C, n, C % BLOCK_K == 0, K, BLOCK_N)
        dh = tl.dot(dz, w2, dh, input_precision=PRECISION)
        if not SAVED:
            u = load_tile(u_ptr + first * C, rows, rows_ok, k, False, C, BLOCK_K)
            if EARLY:
                u -= mean[:, None]
            w1 = load_tile(w1_ptr, n, n < K, k, K % BLOCK_N == 0, C, BLOCK_K)
            a = tl.dot(u, w1.T, a, input_precision=PRECISION)
    if NB > 0 and not EARLY:
        mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok, P, C, eps, CB, NB)
    return a, dh, mean, rstd


@triton.jit
def finish_hidden(
    a, dh, a_ptr, b1_ptr, mean, rstd, rows, rows_ok, n, K: tl.constexpr, SUBTRACTED: tl.constexpr, UNIT: tl.constexpr
):
    """(a, dh) of ``hidden_products`` at the columns ``n``, a loaded from ``a_ptr`` unless that is None.

    SUBTRACTED: μ is. UNIT: b1 holds q. What does not exist is 0.
    """
    n_ok = n < K
    if a_ptr is not None:
        at = rows[:, None] * K + n[None, :]
        a = tl.load(a_ptr + at, mask=rows_ok[:, None] & n_ok[None, :], other=0.0).to(tl.float32)
    else:
        bias = tl.load(b1_ptr + n, mask=n_ok, other=0.0)
        if rstd is not None:
            if not SUBTRACTED:
                a = tl.fma((-mean)[:, None], tl.load(b1_ptr + K + n, mask=n_ok, other=0.0)[None, :], a)
            a = tl.fma(a, rstd[:, None], bias[None, :])
        else:
            a += bias[None, :]
    if UNIT:
        dh *= tl.load(b1_ptr + 2 * K)
    return a, dh


@triton.jit
def _store_hidden_grad(
    a, dh, a_ptr, b1_ptr, mean, rstd, factors_ptr, grn_bias_ptr, sample, h_ptr, da_ptr, db1_ptr, centre_ptr,
    rows, rows_ok, n,
    K: tl.constexpr, SUBTRACTED: tl.constexpr, UNIT: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Finish the columns ``n``, store h, da' and the sums over the rows; (C·m1, C·m2) of these columns."""
    n_ok = n < K
    at = rows[:, None] * K + n[None, :]
    ok = rows_ok[:, None] & n_ok[None, :]
    a, dh = finish_hidden(a, dh, a_ptr, b1_ptr, mean, rstd, rows, rows_ok, n, K, SUBTRACTED, UNIT)
    h, slope = activation_and_grad(a, ACT, FORM)
    if factors_ptr is not None:
        scale, pull = factors_at(factors_ptr, sample, n, K)
        h = tl.where(rows_ok[:, None], h, 0.0)
        dh = tl.fma(dh, scale[None, :], h * pull[None, :])
        h = tl.fma(h, scale[None, :], bias_at(grn_bias_ptr, n, K)[None, :])
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=ok)
    da = dh * slope
    tl.store(db1_ptr + n, tl.sum(da, axis=0), mask=n_ok)
    total, along = None, None
    if rstd is not None:
        da *= rstd[:, None]
    rounded = da.to(da_ptr.dtype.element_ty)
    tl.store(da_ptr + at, rounded, mask=ok)
    if rstd is not None:
        da = rounded.to(tl.float32)
        if centre_ptr is not None:
            tl.store(centre_ptr + n, tl.sum(da * mean[:, None], axis=0), mask=n_ok)
        bias = tl.load(b1_ptr + n, mask=n_ok, other=0.0)
        row_sum = tl.load(b1_ptr + K + n, mask=n_ok, other=0.0)
        total = tl.sum(da * row_sum[None, :], axis=1)
        along = tl.sum(da * (a - bias[None, :]), axis=1)
    return total, along


@triton.jit(do_not_specialize=["P", "rows_per_sample"])
def _hidden_grad_kernel(
    u_ptr, stats_ptr, dz_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, factors_ptr, grn_bias_ptr,
    h_ptr, da_ptr, db1_ptr, centre_ptr, means_ptr, mu_ptr, P, rows_per_sample, depth, eps,
    C: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, UNIT: tl.constexpr, ACT: tl.constexpr,
    FORM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h, da': (P, K); factors (N, 2, K) of GRN or None.

    Partial sums: db1 and, where there are statistics, centre (row tiles, K), and means (column tiles, P, 2), of C·m1
    and C·m2. In float32 there is mu (P,), μ, instead of centre.
    """
    SUBTRACTED: tl.constexpr = u_ptr.dtype.element_ty == tl.float32
    tiles = count_row_tiles(P, rows_per_sample, factors_ptr is not None, BLOCK_M)
    tile_m, tile_n = tile_of_program(tl.program_id(0), tiles, K, BLOCK_N, 8)
    rows = tl.arange(0, BLOCK_M)
    first = tile_m.to(tl.int64) * BLOCK_M
    first, rows_ok, sample = rows_of_tile(first, rows, P, rows_per_sample, factors_ptr is not None, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a, dh, mean, rstd = hidden_products(
        u_ptr, stats_ptr, dz_ptr, w1_ptr, w2_ptr, first, rows, rows_ok, n, P, depth, eps,
        C, K, CB, NB, a_ptr is not None, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if mu_ptr is not None:  # noqa: SIM102 (decided at compile time)
        if tile_n == 0:
            tl.store(mu_ptr + first + rows, mean, mask=rows_ok)
    if a_ptr is not None:
        a_ptr += first * K
    h_ptr += first * K
    da_ptr += first * K
    db1_ptr += tile_m.to(tl.int64) * K
    if centre_ptr is not None:
        centre_ptr += tile_m.to(tl.int64) * K
    if BLOCK_N >= 128:
        a, right_a = halves(a, BLOCK_M, BLOCK_N)
        dh, right_dh = halves(dh, BLOCK_M, BLOCK_N)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        total, along = _store_hidden_grad(
            a, dh, a_ptr, b1_ptr, mean, rstd, factors_ptr, grn_bias_ptr, sample, h_ptr, da_ptr, db1_ptr, centre_ptr,
            rows, rows_ok, n, K, SUBTRACTED, UNIT, ACT, FORM,
        )  # fmt: skip
        right_total, right_along = _store_hidden_grad(
            right_a, right_dh, a_ptr, b1_ptr, mean, rstd, factors_ptr, grn_bias_ptr, sample, h_ptr, da_ptr, db1_ptr,
            centre_ptr, rows, rows_ok, n + BLOCK_N // 2, K, SUBTRACTED, UNIT, ACT, FORM,
        )  # fmt: skip
        if NB > 0:
            total += right_total
            along += right_along
    else:
        total, along = _store_hidden_grad(
            a, dh, a_ptr, b1_ptr, mean, rstd, factors_ptr, grn_bias_ptr, sample, h_ptr, da_ptr, db1_ptr, centre_ptr,
            rows, rows_ok, n, K, SUBTRACTED, UNIT, ACT, FORM,
        )  # fmt: skip
    if NB > 0:
        means_ptr += (tile_n.to(tl.int64) * P + first + rows) * 2
        tl.store(means_ptr, total, mask=rows_ok)
        tl.store(means_ptr + 1, along, mask=rows_ok)


def hidden_grad(
    dz: Tensor, u: Tensor, stats: Tensor | None, a: Tensor | None, w1g: Tensor, b1g: Tensor, w2g: Tensor,
    eps: float, act: str, factors: Factors | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(h, da', db1, centre, means, mu) of the kernel. dz is of ``output_grad``, the rest as in ``mlp_bwd``."""
    P, C = u.shape
    K = w1g.shape[0]
    CB, NB = norm_blocks(stats, C, u.dtype)
    samples = None if factors is None else factors.values.shape[0]
    per_sample = P // (samples or 1)
    config = hidden_grad_config(C, u.dtype, target_of(u), per_sample if samples else None)
    rows, columns = row_tiles(P, samples, config.BLOCK_M), cdiv(K, config.BLOCK_N)

    def partial(*sizes: int) -> Tensor:
        return u.new_empty(sizes, dtype=torch.float32)

    h, da = u.new_empty((2, P, K))
    db1, centre, means, mu = partial(rows, K), None, None, None
    if stats is not None:
        means = partial(columns, P, 2)
        centre, mu = (None, partial(P)) if u.dtype == torch.float32 else (partial(rows, K), None)
    launch(
        _hidden_grad_kernel, (rows * columns,),
        u, stats, dz, a, w1g, b1g, w2g, *(factors or (None, None)), h, da, db1, centre, means, mu,
        P, per_sample, C, eps,
        C=C, K=K, CB=CB, NB=NB, UNIT=b1g.shape[0] == 3, ACT=act, FORM=gelu_form(u.dtype),
        PRECISION=dot_precision(u.dtype), **config.__dict__,
    )  # fmt: skip
    return h, da, db1, centre, means, mu
