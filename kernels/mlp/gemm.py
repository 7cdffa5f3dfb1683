"""Pointwise MLP of wide blocks: two GEMMs with fused epilogues.

fc1 takes LayerNorm out of the product, so that u goes to the matrix units as it is:

    a = rstd·(u·w1gᵀ − μ·s) + b1g      s_k = Σ_c w1g[k, c]      h = act(a)

A normalising prologue would touch every loaded element of u once per column tile (about 2.5·C/BLOCK_N instructions per
hidden element, and a trip through registers); this epilogue costs 2. float32 has digits to lose, with TF32 most of
them, so there μ is subtracted from u as it is loaded, a = rstd·((u − μ)·w1gᵀ) + b1g, for 2 % more instructions, and 8 %
with TF32 (C = 192, executed on sm_80; in the backward 1 to 2, and 1 to 8). fc2 ends with γ, drop path and residual:

    y = residual + scale·γ·(h·w2ᵀ + b2)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import activation
from ..autotuning import fastest
from ..gelu import gelu_form
from ..integers import cdiv
from ..launching import launch
from ..statistics import merge_statistics
from ..targets import target_of
from .tuning import GemmConfig, dot_precision, gemm_configs, norm_blocks, statistics_first


@triton.jit
def tile_of_program(P, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of this program: GROUP row tiles by all column tiles at a time, for the L2 cache."""
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP * columns)
    size = tl.minimum(tl.cdiv(P, BLOCK_M) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * columns)
    return group * GROUP + within % size, within // size


@triton.jit
def load_tile(ptr, rows, rows_ok, cols, ROWS_EVEN: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows by WIDTH columns of a row-major matrix of COLS columns; zero outside. ROWS_EVEN: all rows are ok."""
    at = rows[:, None] * COLS + cols[None, :]
    if COLS % WIDTH == 0:
        if ROWS_EVEN:
            return tl.load(ptr + at)
        else:
            return tl.load(ptr + at, mask=rows_ok[:, None], other=0.0)
    else:
        if ROWS_EVEN:
            return tl.load(ptr + at, mask=(cols < COLS)[None, :], other=0.0)
        else:
            return tl.load(ptr + at, mask=rows_ok[:, None] & (cols < COLS)[None, :], other=0.0)


@triton.jit
def dot_rows(
    a_ptr, b_ptr, mean, rows, rows_ok, n, acc, depth, N: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + (A − mean)·Bᵀ of a tile, A (·, DEPTH) from ``a_ptr`` at ``rows``, B (N, DEPTH) at ``n``; mean may be None.

    ``depth`` is DEPTH as a runtime value, so that the compiler does not unroll the whole loop and spill.
    """
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = load_tile(a_ptr, rows, rows_ok, k, False, DEPTH, BLOCK_K)
        if mean is not None:
            a -= mean[:, None]
        b = load_tile(b_ptr, n, n < N, k, N % BLOCK_N == 0, DEPTH, BLOCK_K)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store_hidden(
    a, b1_ptr, mean, rstd, a_ptr, h_ptr, rows, rows_ok, n, K: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """Normalise the columns ``n`` of the product, add the bias; store that, if wanted, and the activations.

    No mean: it is subtracted already; no rstd: there is no LayerNorm.
    """
    n_ok = n < K
    bias = tl.load(b1_ptr + n, mask=n_ok, other=0.0)
    if mean is not None:
        a = tl.fma((-mean)[:, None], tl.load(b1_ptr + K + n, mask=n_ok, other=0.0)[None, :], a)
    if rstd is not None:
        a = tl.fma(a, rstd[:, None], bias[None, :])
    else:
        a += bias[None, :]
    at = rows[:, None] * K + n[None, :]
    ok = rows_ok[:, None] & n_ok[None, :]
    if a_ptr is not None:
        tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=ok)
    tl.store(h_ptr + at, activation(a, ACT, FORM).to(h_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["P"])
def _fc1_kernel(
    u_ptr, stats_ptr, w1_ptr, b1_ptr, h_ptr, a_ptr, P, depth, eps,
    C: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(P, K, BLOCK_M, BLOCK_N, 8)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    rows_ok = first + rows < P
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mean, rstd, subtracted = None, None, None
    if NB > 0 and EARLY:
        mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok, P, C, eps, CB, NB)
        if u_ptr.dtype.element_ty == tl.float32:
            mean, subtracted = None, mean
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    a = dot_rows(u_ptr + first * C, w1_ptr, subtracted, rows, rows_ok, n, a, depth, K, C, PRECISION, BLOCK_N, BLOCK_K)
    if NB > 0 and not EARLY:
        mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok, P, C, eps, CB, NB)
    h_ptr += first * K
    if a_ptr is not None:
        a_ptr += first * K
    if BLOCK_N >= 128:  # in halves, to save registers
        left, right = halves(a, BLOCK_M, BLOCK_N)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _store_hidden(left, b1_ptr, mean, rstd, a_ptr, h_ptr, rows, rows_ok, n, K, ACT, FORM)
        _store_hidden(right, b1_ptr, mean, rstd, a_ptr, h_ptr, rows, rows_ok, n + BLOCK_N // 2, K, ACT, FORM)
    else:
        _store_hidden(a, b1_ptr, mean, rstd, a_ptr, h_ptr, rows, rows_ok, n, K, ACT, FORM)


@triton.jit
def _store_result(z, residual_ptr, b2_ptr, gamma_ptr, s, y_ptr, rows, rows_ok, n, C: tl.constexpr):
    """Store y = residual + s·γ·(z + b2) of the columns ``n``."""
    n_ok = n < C
    if b2_ptr is not None:
        z += tl.load(b2_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if gamma_ptr is not None:
        z *= tl.load(gamma_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if s is not None:
        z *= s[:, None]
    at = rows[:, None] * C + n[None, :]
    ok = rows_ok[:, None] & n_ok[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["P", "rows_per_sample"])
def _fc2_kernel(
    h_ptr, w2_ptr, residual_ptr, b2_ptr, gamma_ptr, drop_scale_ptr, y_ptr, P, rows_per_sample, depth,
    C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(P, C, BLOCK_M, BLOCK_N, 8)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    rows_ok = first + rows < P
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    z = dot_rows(h_ptr + first * K, w2_ptr, None, rows, rows_ok, n, z, depth, C, K, PRECISION, BLOCK_N, BLOCK_K)
    s = None
    if drop_scale_ptr is not None:
        s = tl.load(drop_scale_ptr + (first + rows) // rows_per_sample, mask=rows_ok, other=0.0).to(tl.float32)
    y_ptr += first * C
    if residual_ptr is not None:
        residual_ptr += first * C
    if BLOCK_N >= 128:  # in halves, so that sums and residual of a whole tile are not in registers together
        left, right = halves(z, BLOCK_M, BLOCK_N)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _store_result(left, residual_ptr, b2_ptr, gamma_ptr, s, y_ptr, rows, rows_ok, n, C)
        _store_result(right, residual_ptr, b2_ptr, gamma_ptr, s, y_ptr, rows, rows_ok, n + BLOCK_N // 2, C)
    else:
        _store_result(z, residual_ptr, b2_ptr, gamma_ptr, s, y_ptr, rows, rows_ok, n, C)


def fc1(
    u: Tensor, stats: Tensor | None, w1g: Tensor, b1g: Tensor, eps: float, act: str, save_hidden: bool
) -> tuple[Tensor, Tensor | None]:
    """(act(a), a), both (P, K) in u's dtype; the second is None unless ``save_hidden``. Arguments of ``mlp_fwd``."""
    P, C = u.shape
    K = w1g.shape[0]
    h = torch.empty((P, K), dtype=u.dtype, device=u.device)
    a = torch.empty_like(h) if save_hidden else None
    CB, NB = norm_blocks(stats, C, u.dtype)
    early = u.dtype == torch.float32 or statistics_first(C, target_of(u))

    def run(config: GemmConfig) -> None:
        launch(
            _fc1_kernel, (cdiv(P, config.BLOCK_M) * cdiv(K, config.BLOCK_N),),
            u, stats, w1g, b1g, h, a, P, C, eps,
            C=C, K=K, CB=CB, NB=NB,
            ACT=act, FORM=gelu_form(u.dtype), PRECISION=dot_precision(u), EARLY=early,
            **config.__dict__,
        )  # fmt: skip

    run(fastest(_fc1_kernel, run, gemm_configs(K, u.dtype, target_of(u), save_hidden), u, P, (C, K, act, save_hidden)))
    return h, a


def fc2(
    h: Tensor, w2: Tensor, residual: Tensor | None, b2: Tensor | None, gamma: Tensor | None, drop_scale: Tensor | None
) -> Tensor:
    """y (P, C) = residual + drop_scale·γ·(h·w2ᵀ + b2), in the residual's dtype, else h's. Arguments of ``mlp_fwd``."""
    P, K = h.shape
    C = w2.shape[0]
    y = torch.empty((P, C), dtype=h.dtype, device=h.device) if residual is None else torch.empty_like(residual)
    if P == 0:
        return y

    def run(config: GemmConfig) -> None:
        launch(
            _fc2_kernel, (cdiv(P, config.BLOCK_M) * cdiv(C, config.BLOCK_N),),
            h, w2, residual, b2, gamma, drop_scale, y, P, 1 if drop_scale is None else P // drop_scale.numel(), K,
            C=C, K=K, PRECISION=dot_precision(h),
            **config.__dict__,
        )  # fmt: skip

    run(fastest(_fc2_kernel, run, gemm_configs(C, h.dtype, target_of(h)), h, P, (C, K, y.dtype)))
    return y


def gemm_mlp_fwd(
    u, stats, residual, w1g, b1g, w2, b2, gamma, drop_scale, eps, act, save_hidden
) -> tuple[Tensor, Tensor | None]:
    """``mlp_fwd``, whose arguments it takes, as two GEMMs, whatever the width."""
    h, a = fc1(u, stats, w1g, b1g, eps, act, save_hidden)
    return fc2(h, w2, residual, b2, gamma, drop_scale), a
