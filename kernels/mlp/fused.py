"""Pointwise MLP of the block, forward: LayerNorm → fc1 → activation → fc2 → layer scale → drop path → residual.

    x̂ = (u − μ)·rstd      a = x̂·w1gᵀ + b1g      h = act(a)      y = residual + s·γ·(h·w2ᵀ + b2)

u and y are (P, C), pixels by channels, a and h (P, K); w1g, b1g carry LayerNorm's affine (``folding.py``); s is one
factor per sample. Narrow blocks in 16 bits run in one kernel: a program keeps BLOCK_M rows of x̂ and of the result on
the chip and walks K, so h never leaves the SM. A width is cut into parts that are powers of two (96 = 3·32 or 64 + 32,
see ``split_width``), so that a tile wastes less than a third. Wide blocks and float32 run as two GEMMs
(``gemm.py``).

In bfloat16 h is twice GELU, which saves an instruction per element, and the sum is halved: factors of two cost bfloat16
no digits and, unlike float16, no range that matters.

With the global response norm (``grn.py``) a first pass, fc1 without its output, sums the squares of h, and this kernel,
the second pass, multiplies GRN(h).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import activation
from ..autotuning import fastest
from ..dtypes import dot_precision
from ..gelu import gelu_form, twice_gelu
from ..launching import launch
from ..statistics import merge_statistics
from ..targets import target_of
from .gemm import fc1, halves
from .grn import bias_at, factor_at, inverse_mean, row_tiles, rows_of_tile
from .tuning import FusedConfig, are_few, are_many, fused_configs, norm_blocks, split_width


@triton.jit
def load_rows(ptr, rows, rows_ok, C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) channels from FIRST on of a row-major (·, C) tensor; zero outside. ``rows`` are 32-bit."""
    c = FIRST + tl.arange(0, WIDTH)
    at = rows[:, None] * C + c[None, :]
    if FIRST + WIDTH <= C:
        return tl.load(ptr + at, mask=rows_ok[:, None], other=0.0)
    else:
        return tl.load(ptr + at, mask=rows_ok[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, value, rows, rows_ok, C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Store ``value``, rounded to the type behind ``ptr``, where ``load_rows`` would have loaded it."""
    c = FIRST + tl.arange(0, WIDTH)
    at = rows[:, None] * C + c[None, :]
    if FIRST + WIDTH <= C:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=rows_ok[:, None])
    else:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=rows_ok[:, None] & (c < C)[None, :])


@triton.jit
def load_vector(ptr, C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """float32 entries FIRST … FIRST + WIDTH of a vector of C; zero outside and where ``ptr`` is None."""
    if ptr is None:
        return tl.zeros((WIDTH,), tl.float32)
    else:
        c = FIRST + tl.arange(0, WIDTH)
        if FIRST + WIDTH <= C:
            return tl.load(ptr + c).to(tl.float32)
        else:
            return tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def load_fc1(
    ptr, k, K: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """(k, WIDTH) tile of w1g (K, C); zero outside. ``k``: BLOCK_K indices."""
    c = FIRST + tl.arange(0, WIDTH)
    at = k[:, None] * C + c[None, :]
    if K % BLOCK_K == 0 and FIRST + WIDTH <= C:
        return tl.load(ptr + at)
    else:
        return tl.load(ptr + at, mask=(k < K)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def load_fc2(
    ptr, k, K: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """(WIDTH, k) tile of w2 (C, K); zero outside."""
    c = FIRST + tl.arange(0, WIDTH)
    at = c[:, None] * K + k[None, :]
    if K % BLOCK_K == 0 and FIRST + WIDTH <= C:
        return tl.load(ptr + at)
    else:
        return tl.load(ptr + at, mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def normalise(u, mean, rstd, NORM: tl.constexpr):
    """x̂ of rows ``u`` in the type of ``u``, or ``u`` itself without NORM."""
    if NORM:
        return tl.fma(u.to(tl.float32), rstd[:, None], (-mean * rstd)[:, None]).to(u.dtype)
    else:
        return u


@triton.jit
def _finish(
    z, residual_ptr, gamma_ptr, s, y_ptr, copy_ptr, rows, rows_ok,
    TIMES: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store y = residual + s·γ·z/TIMES for channels FIRST … FIRST + WIDTH, and its copy if there is one.

    A residual of 32 bits comes in parts of 32 channels, so that a whole one is not in registers beside the sums.
    """
    if WIDTH > 32 and y_ptr.dtype.element_ty == tl.float32:
        left, right = halves(z, BLOCK_M, WIDTH)
        HALF: tl.constexpr = WIDTH // 2
        _finish(left, residual_ptr, gamma_ptr, s, y_ptr, copy_ptr, rows, rows_ok, TIMES, C, FIRST, HALF, BLOCK_M)
        _finish(
            right, residual_ptr, gamma_ptr, s, y_ptr, copy_ptr, rows, rows_ok, TIMES, C, FIRST + HALF, HALF, BLOCK_M
        )
    else:
        if gamma_ptr is not None:
            z *= (load_vector(gamma_ptr, C, FIRST, WIDTH) * (1.0 / TIMES))[None, :]
        elif TIMES != 1:
            z *= 1.0 / TIMES
        if s is not None:
            z *= s[:, None]
        if residual_ptr is not None:
            z += load_rows(residual_ptr, rows, rows_ok, C, FIRST, WIDTH).to(tl.float32)
        store_rows(y_ptr, z, rows, rows_ok, C, FIRST, WIDTH)
        if copy_ptr is not None:
            store_rows(copy_ptr, z, rows, rows_ok, C, FIRST, WIDTH)


@triton.jit(do_not_specialize=["P", "rows_per_sample"])
def _mlp_fwd_kernel(
    u_ptr, stats_ptr, residual_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, gamma_ptr, drop_scale_ptr,
    sums_ptr, grn_weight_ptr, grn_bias_ptr, y_ptr, copy_ptr, a_ptr, P, rows_per_sample, eps,
    C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, TILES: tl.constexpr,
    ACT: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """PARTS: (first channel, width) of each part of C. sums (N, TILES, K): of h², for GRN."""
    TIMES: tl.constexpr = 2 if ACT == "gelu" and FORM == "short3" else 1
    rows = tl.arange(0, BLOCK_M)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    first, rows_ok, sample = rows_of_tile(first, rows, P, rows_per_sample, sums_ptr is not None, BLOCK_M)
    if sums_ptr is not None:
        sums_ptr += sample * (TILES * K)
        inverse = inverse_mean(sums_ptr, K, TILES)
    u_ptr += first * C
    y_ptr += first * C
    if copy_ptr is not None:
        copy_ptr += first * C
    mean, rstd = None, None
    if NB > 0:
        mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok, P, C, eps, CB, NB)
    x = ()
    z = ()
    for i in tl.static_range(len(PARTS)):
        x += (normalise(load_rows(u_ptr, rows, rows_ok, C, PARTS[i][0], PARTS[i][1]), mean, rstd, NB > 0),)
        b2 = load_vector(b2_ptr, C, PARTS[i][0], PARTS[i][1]) * TIMES
        z += (tl.broadcast_to(b2[None, :], (BLOCK_M, PARTS[i][1])),)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            bias = tl.load(b1_ptr + k)
        else:
            bias = tl.load(b1_ptr + k, mask=k < K, other=0.0)
        a = tl.broadcast_to(bias[None, :], (BLOCK_M, BLOCK_K))
        for i in tl.static_range(len(PARTS)):
            w1 = load_fc1(w1_ptr, k, K, C, PARTS[i][0], PARTS[i][1], BLOCK_K)
            a = tl.dot(x[i], w1.T, a, input_precision=PRECISION)
        if a_ptr is not None:
            at = rows[:, None] * K + k[None, :]
            tl.store(a_ptr + first * K + at, a.to(a_ptr.dtype.element_ty), mask=rows_ok[:, None] & (k < K)[None, :])
        h = twice_gelu(a, FORM) if TIMES == 2 else activation(a, ACT, FORM)
        if sums_ptr is not None:
            factor = factor_at(sums_ptr, grn_weight_ptr, inverse, k, K, TILES)
            h = tl.fma(h, factor[None, :], (bias_at(grn_bias_ptr, k, K) * TIMES)[None, :])
        h = h.to(u_ptr.dtype.element_ty)
        sums = ()
        for i in tl.static_range(len(PARTS)):
            w2 = load_fc2(w2_ptr, k, K, C, PARTS[i][0], PARTS[i][1], BLOCK_K)
            sums += (tl.dot(h, w2.T, z[i], input_precision=PRECISION),)
        z = sums
    s = None
    if drop_scale_ptr is not None:
        s = tl.load(drop_scale_ptr + (first + rows) // rows_per_sample, mask=rows_ok, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptr += first * C
    for i in tl.static_range(len(PARTS)):
        _finish(
            z[i], residual_ptr, gamma_ptr, s, y_ptr, copy_ptr, rows, rows_ok,
            TIMES, C, PARTS[i][0], PARTS[i][1], BLOCK_M,
        )  # fmt: skip


def fused_mlp_fwd(
    u, stats, residual, w1g, b1g, w2, b2, gamma, drop_scale, eps, act, save_hidden, grn=None, out=None
) -> tuple[Tensor, Tensor | None]:
    """``mlp_fwd`` with the same arguments, with h on the chip, for any width."""
    P, C = u.shape
    K = w1g.shape[0]
    y, copy = out or ((u if residual is None else residual).new_empty((P, C)), None)
    a = u.new_empty((P, K)) if save_hidden else None
    if P == 0:
        return y, a
    scaling = None if grn is None else fc1(u, stats, w1g, b1g, eps, act, False, grn, keeps=False)[2]
    samples = None if grn is None else grn.samples
    parts = samples or (1 if drop_scale is None else drop_scale.numel())
    lean = not save_hidden
    CB, NB = norm_blocks(stats, C, u.dtype)

    def run(config: FusedConfig) -> None:
        launch(
            _mlp_fwd_kernel, (row_tiles(P, samples, config.BLOCK_M),),
            u, stats, residual, w1g, b1g, w2, b2, gamma, drop_scale, *(scaling or (None, None, None)), y, copy, a,
            P, P // parts, eps,
            C=C, K=K, PARTS=split_width(C, target_of(u)), CB=CB, NB=NB,
            TILES=0 if scaling is None else scaling.sums.shape[1],
            ACT=act, FORM=gelu_form(u.dtype), PRECISION=dot_precision(u.dtype),
            **config.__dict__,
        )  # fmt: skip

    target = target_of(u)
    few, many, wide = are_few(P, target), are_many(P, target), y.dtype == torch.float32
    candidates = fused_configs(C, K, lean, target, grn is not None, few, many, wide)
    residual_dtype = None if residual is None else residual.dtype
    given = C, K, act, save_hidden, residual_dtype, y.dtype, copy is None, samples
    run(fastest(_mlp_fwd_kernel, run, candidates, u, P, given))
    return y, a
