"""Pointwise MLP of wide blocks: two GEMMs with fused epilogues.

fc1 takes LayerNorm out of the product, so that u goes to the matrix units as it is:

    a = rstd·(u·w1gᵀ − μ·s) + b1g      s_k = Σ_c w1g[k, c]      h = act(a)

A normalising prologue would touch every loaded element of u once per column tile (about 2.5·C/BLOCK_N instructions per
hidden element, and a trip through registers); this epilogue costs 2. float32 would lose digits, with TF32 most of
them, so there μ is subtracted from u as it is loaded, a = rstd·((u − μ)·w1gᵀ) + b1g, for 2 % more instructions, and 8 %
with TF32 (C = 192, executed on sm_80; in the backward 1 to 2, and 1 to 8). fc2 ends with γ, drop path and residual:

    y = residual + scale·γ·(h·w2ᵀ + b2)

With the global response norm (``grn.py``) fc1 leaves partial sums of h² too, and fc2 multiplies GRN(h).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import activation
from ..autotuning import fastest
from ..dtypes import dot_precision
from ..gelu import gelu_form
from ..integers import cdiv
from ..launching import launch
from ..statistics import merge_statistics
from ..targets import target_of
from .grn import Grn, Scaling, bias_at, count_row_tiles, factor_at, few_tiles, inverse_mean, row_tiles, rows_of_tile
from .tuning import GemmConfig, gemm_configs, norm_blocks, statistics_first, tile_parts


@triton.jit
def tile_of_program(program, tiles, N: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) number ``program``: GROUP row ``tiles`` by all column tiles at a time, for L2."""
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = program // (GROUP * columns)
    size = tl.minimum(tiles - group * GROUP, GROUP)
    within = program % (GROUP * columns)
    return group * GROUP + within % size, within // size


@triton.constexpr_function
def first_of(parts, i):
    """Where a part begins. What is indexed in a kernel is a constexpr in Triton 3.9, in 3.6 a number of Python."""
    return parts[i][0]


@triton.constexpr_function
def size_of(parts, i):
    """How many rows or columns a part has."""
    return parts[i][1]


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
def dot_tile(
    a_ptr, b_ptr, mean, sums_ptr, weight_ptr, bias_ptr, rows_ok, column, depth,
    N: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The products (A − mean)·Bᵀ of each part of a tile's rows with each part of its columns, in this order.

    A (·, DEPTH) from ``a_ptr`` on, B (N, DEPTH); ``column``: the tile's first. ``rows_ok`` and ``mean``, () for none,
    are of each part of the rows. With a sample's sums, A is GRN of what lies at ``a_ptr``. ``depth`` is DEPTH as a
    runtime value, so that the compiler does not unroll the whole loop and spill.
    """
    if sums_ptr is not None:
        inverse = inverse_mean(sums_ptr, DEPTH, TILES)
    products = ()
    for i in tl.static_range(len(ROWS)):
        for j in tl.static_range(len(COLUMNS)):
            products += (tl.zeros((size_of(ROWS, i), size_of(COLUMNS, j)), tl.float32),)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        lefts, rights, sums = (), (), ()
        for i in tl.static_range(len(ROWS)):
            rows = first_of(ROWS, i) + tl.arange(0, size_of(ROWS, i))
            a = load_tile(a_ptr, rows, rows_ok[i], k, False, DEPTH, BLOCK_K)
            if len(mean) > 0:
                a -= mean[i][:, None]
            if sums_ptr is not None:
                factor = factor_at(sums_ptr, weight_ptr, inverse, k, DEPTH, TILES)
                a = tl.fma(a.to(tl.float32), factor[None, :], bias_at(bias_ptr, k, DEPTH)[None, :]).to(a.dtype)
            lefts += (a,)
        for j in tl.static_range(len(COLUMNS)):
            n = column + first_of(COLUMNS, j) + tl.arange(0, size_of(COLUMNS, j))
            rights += (load_tile(b_ptr, n, n < N, k, N % BLOCK_N == 0, DEPTH, BLOCK_K),)
        for i in tl.static_range(len(ROWS)):
            for j in tl.static_range(len(COLUMNS)):
                product = products[i * len(COLUMNS) + j]
                sums += (tl.dot(lefts[i], rights[j].T, product, input_precision=PRECISION),)
        products = sums
    return products


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store_hidden(
    a, b1_ptr, mean, rstd, a_ptr, h_ptr, sums_ptr, rows, rows_ok, n,
    K: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Normalise the columns ``n`` of the product, add the bias; store that, the activations, the sums of their squares.

    What has no pointer is not stored. No mean: it is subtracted already; no rstd: there is no LayerNorm.
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
    h = activation(a, ACT, FORM)
    if sums_ptr is not None:
        present = tl.where(rows_ok[:, None], h, 0.0)
        tl.store(sums_ptr + n, tl.sum(present * present, axis=0), mask=n_ok)
    if h_ptr is not None:
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=ok)


@triton.jit
def end_hidden(
    a, b1_ptr, mean, rstd, a_ptr, h_ptr, sums_ptr, rows, rows_ok, column,
    K: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """``_store_hidden`` of the WIDTH columns from ``column`` on; HALVES: one after the other, which takes fewer
    registers.
    """
    if HALVES:
        left, right = halves(a, BLOCK_M, WIDTH)
        n = column + tl.arange(0, WIDTH // 2)
        _store_hidden(left, b1_ptr, mean, rstd, a_ptr, h_ptr, sums_ptr, rows, rows_ok, n, K, ACT, FORM)
        n += WIDTH // 2
        _store_hidden(right, b1_ptr, mean, rstd, a_ptr, h_ptr, sums_ptr, rows, rows_ok, n, K, ACT, FORM)
    else:
        n = column + tl.arange(0, WIDTH)
        _store_hidden(a, b1_ptr, mean, rstd, a_ptr, h_ptr, sums_ptr, rows, rows_ok, n, K, ACT, FORM)


@triton.jit(do_not_specialize=["P", "rows_per_sample"])
def _fc1_kernel(
    u_ptr, stats_ptr, w1_ptr, b1_ptr, h_ptr, a_ptr, sums_ptr, P, rows_per_sample, depth, eps,
    C: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS, COLUMNS: the parts of a tile (``tile_parts``); one part of rows where there are sums."""
    BY_SAMPLE: tl.constexpr = sums_ptr is not None
    tiles = count_row_tiles(P, rows_per_sample, BY_SAMPLE, BLOCK_M)
    tile_m, tile_n = tile_of_program(tl.program_id(0), tiles, K, BLOCK_N, 8)
    start = tile_m.to(tl.int64) * BLOCK_M
    first = start
    rows_ok, statistics, subtracted = (), (), ()
    for i in tl.static_range(len(ROWS)):
        rows = first_of(ROWS, i) + tl.arange(0, size_of(ROWS, i))
        first, ok, _ = rows_of_tile(start, rows, P, rows_per_sample, BY_SAMPLE, BLOCK_M)
        rows_ok += (ok,)
        if NB > 0 and EARLY:
            mean, rstd = merge_statistics(stats_ptr, first + rows, ok, P, C, eps, CB, NB)
            if u_ptr.dtype.element_ty == tl.float32:
                subtracted += (mean,)
            statistics += ((mean, rstd),)
    products = dot_tile(
        u_ptr + first * C, w1_ptr, subtracted, None, None, None, rows_ok, tile_n * BLOCK_N, depth,
        K, C, 0, PRECISION, ROWS, COLUMNS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if h_ptr is not None:
        h_ptr += first * K
    if a_ptr is not None:
        a_ptr += first * K
    if sums_ptr is not None:
        sums_ptr += tile_m.to(tl.int64) * K
    for i in tl.static_range(len(ROWS)):
        rows = first_of(ROWS, i) + tl.arange(0, size_of(ROWS, i))
        mean, rstd = None, None
        if NB > 0 and EARLY:
            mean, rstd = statistics[i]
            if len(subtracted) > 0:
                mean = None
        elif NB > 0:
            mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok[i], P, C, eps, CB, NB)
        for j in tl.static_range(len(COLUMNS)):
            end_hidden(
                products[i * len(COLUMNS) + j], b1_ptr, mean, rstd, a_ptr, h_ptr, sums_ptr, rows, rows_ok[i],
                tile_n * BLOCK_N + first_of(COLUMNS, j), K, ACT, FORM, size_of(ROWS, i), size_of(COLUMNS, j),
                size_of(COLUMNS, j) >= 128,
            )  # fmt: skip


@triton.jit
def _store_result(
    z, residual_ptr, b2_ptr, gamma_ptr, s, y_ptr, copy_ptr, rows, rows_ok, first,
    C: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store y = residual + s·γ·(z + b2) of the WIDTH columns from ``first`` on, and its copy if there is one.

    In parts of PART columns, so that sums and residual of the whole are not in registers together.
    """
    if WIDTH > PART:
        left, right = halves(z, BLOCK_M, WIDTH)
        HALF: tl.constexpr = WIDTH // 2
        _store_result(
            left, residual_ptr, b2_ptr, gamma_ptr, s, y_ptr, copy_ptr, rows, rows_ok, first, C, BLOCK_M, HALF, PART
        )
        _store_result(
            right, residual_ptr, b2_ptr, gamma_ptr, s, y_ptr, copy_ptr, rows, rows_ok, first + HALF,
            C, BLOCK_M, HALF, PART,
        )  # fmt: skip
    else:
        n = first + tl.arange(0, WIDTH)
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
        if copy_ptr is not None:
            tl.store(copy_ptr + at, z.to(copy_ptr.dtype.element_ty), mask=ok)


@triton.jit
def end_result(
    z, residual_ptr, b2_ptr, gamma_ptr, drop_scale_ptr, y_ptr, copy_ptr, column, first, rows, rows_ok,
    rows_per_sample, C: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """``_store_result`` of WIDTH columns of a tile at row ``first``, in HALVES, or by 32 columns if y is float32."""
    s = None
    if drop_scale_ptr is not None:
        s = tl.load(drop_scale_ptr + (first + rows) // rows_per_sample, mask=rows_ok, other=0.0).to(tl.float32)
    y_ptr += first * C
    if copy_ptr is not None:
        copy_ptr += first * C
    if residual_ptr is not None:
        residual_ptr += first * C
    LEAST: tl.constexpr = 32 if y_ptr.dtype.element_ty == tl.float32 else 64 if WIDTH <= 128 else 128
    PART: tl.constexpr = LEAST if HALVES else WIDTH
    _store_result(
        z, residual_ptr, b2_ptr, gamma_ptr, s, y_ptr, copy_ptr, rows, rows_ok, column, C, BLOCK_M, WIDTH, PART
    )


@triton.jit(do_not_specialize=["P", "rows_per_sample"])
def _fc2_kernel(
    h_ptr, w2_ptr, residual_ptr, b2_ptr, gamma_ptr, drop_scale_ptr, sums_ptr, grn_weight_ptr, grn_bias_ptr, y_ptr,
    copy_ptr, P, rows_per_sample, depth,
    C: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS, COLUMNS: as of ``_fc1_kernel``."""
    BY_SAMPLE: tl.constexpr = sums_ptr is not None
    tiles = count_row_tiles(P, rows_per_sample, BY_SAMPLE, BLOCK_M)
    tile_m, tile_n = tile_of_program(tl.program_id(0), tiles, C, BLOCK_N, 8)
    start = tile_m.to(tl.int64) * BLOCK_M
    first, sample = start, tl.zeros((), tl.int64)
    rows_ok = ()
    for i in tl.static_range(len(ROWS)):
        rows = first_of(ROWS, i) + tl.arange(0, size_of(ROWS, i))
        first, ok, sample = rows_of_tile(start, rows, P, rows_per_sample, BY_SAMPLE, BLOCK_M)
        rows_ok += (ok,)
    if sums_ptr is not None:
        sums_ptr += sample * (TILES * K)
    products = dot_tile(
        h_ptr + first * K, w2_ptr, (), sums_ptr, grn_weight_ptr, grn_bias_ptr, rows_ok, tile_n * BLOCK_N, depth,
        C, K, TILES, PRECISION, ROWS, COLUMNS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    for i in tl.static_range(len(ROWS)):
        rows = first_of(ROWS, i) + tl.arange(0, size_of(ROWS, i))
        for j in tl.static_range(len(COLUMNS)):
            end_result(
                products[i * len(COLUMNS) + j], residual_ptr, b2_ptr, gamma_ptr, drop_scale_ptr, y_ptr, copy_ptr,
                tile_n * BLOCK_N + first_of(COLUMNS, j), first, rows, rows_ok[i], rows_per_sample,
                C, size_of(ROWS, i), size_of(COLUMNS, j), BLOCK_N >= 128,
            )  # fmt: skip


def fc1(
    u: Tensor,
    stats: Tensor | None,
    w1g: Tensor,
    b1g: Tensor,
    eps: float,
    act: str,
    save_hidden: bool,
    grn: Grn | None = None,
    keeps: bool = True,
) -> tuple[Tensor | None, Tensor | None, Scaling | None]:
    """(act(a), a), both (P, K) in u's dtype, and what ``fc2`` makes GRN from. Arguments of ``mlp_fwd``.

    The first is None unless ``keeps``, the second unless ``save_hidden``, the third without ``grn``.
    """
    P, C = u.shape
    K = w1g.shape[0]
    h = u.new_empty((P, K)) if keeps else None
    a = u.new_empty((P, K)) if save_hidden else None
    CB, NB = norm_blocks(stats, C, u.dtype)
    early = u.dtype == torch.float32 or statistics_first(C, target_of(u))
    samples = None if grn is None else grn.samples
    per_sample = P // samples if samples else None

    def run(config: GemmConfig) -> Tensor | None:
        tiles = row_tiles(P, samples, config.BLOCK_M)
        sums = None
        if samples is not None:
            sums = u.new_empty((samples, tiles // max(samples, 1), K), dtype=torch.float32)
        parts = tile_parts(config.BLOCK_M)
        launch(
            _fc1_kernel, (tiles * cdiv(K, config.BLOCK_N),),
            u, stats, w1g, b1g, h, a, sums, P, per_sample or 1, C, eps,
            C=C, K=K, CB=CB, NB=NB,
            ACT=act, FORM=gelu_form(u.dtype), PRECISION=dot_precision(u.dtype),
            EARLY=early and len(parts) == 1, ROWS=parts, COLUMNS=tile_parts(config.BLOCK_N), **config.__dict__,
        )  # fmt: skip
        return sums

    heavy = save_hidden or (grn is not None and C > 512)
    candidates = gemm_configs(P, K, u.dtype, target_of(u), heavy, per_sample, False, C)
    sums = run(fastest(_fc1_kernel, run, candidates, u, P, (C, K, act, save_hidden, keeps, samples)))
    return h, a, None if grn is None else Scaling(few_tiles(sums), grn.weight, grn.bias)


def fc2(
    h: Tensor,
    w2: Tensor,
    residual: Tensor | None,
    b2: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    scaling: Scaling | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """y (P, C) = residual + drop_scale·γ·(GRN(h)·w2ᵀ + b2), without ``out`` in the residual's dtype, else h's.

    Arguments of ``mlp_fwd``. ``scaling``: of ``fc1``, or None, where GRN(h) is h.
    """
    P, K = h.shape
    C = w2.shape[0]
    y, copy = out or ((h if residual is None else residual).new_empty((P, C)), None)
    if P == 0:
        return y
    samples = None if scaling is None else scaling.sums.shape[0]
    per_sample = P // (samples or (1 if drop_scale is None else drop_scale.numel()))

    def run(config: GemmConfig) -> None:
        launch(
            _fc2_kernel, (row_tiles(P, samples, config.BLOCK_M) * cdiv(C, config.BLOCK_N),),
            h, w2, residual, b2, gamma, drop_scale, *(scaling or (None, None, None)), y, copy, P, per_sample, K,
            C=C, K=K, TILES=0 if scaling is None else scaling.sums.shape[1], PRECISION=dot_precision(h.dtype),
            ROWS=tile_parts(config.BLOCK_M), COLUMNS=tile_parts(config.BLOCK_N), **config.__dict__,
        )  # fmt: skip

    grn = scaling is not None
    candidates = gemm_configs(P, C, h.dtype, target_of(h), grn, per_sample if grn else None, y.dtype == torch.float32)
    residual_dtype = None if residual is None else residual.dtype
    run(fastest(_fc2_kernel, run, candidates, h, P, (C, K, residual_dtype, y.dtype, copy is None, samples)))
    return y


def gemm_mlp_fwd(
    u, stats, residual, w1g, b1g, w2, b2, gamma, drop_scale, eps, act, save_hidden, grn=None, out=None
) -> tuple[Tensor, Tensor | None]:
    """``mlp_fwd`` with the same arguments, as two GEMMs, for any width."""
    h, a, scaling = fc1(u, stats, w1g, b1g, eps, act, save_hidden, grn)
    return fc2(h, w2, residual, b2, gamma, drop_scale, scaling, out), a
