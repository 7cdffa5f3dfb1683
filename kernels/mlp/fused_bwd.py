"""Backward of narrow blocks in 16 bits: two kernels, neither of which writes a hidden activation to memory.

    a = x̂·w1gᵀ + b1g    h = act(a)    dz' = s·dy    dh = q·(dz'·w2g), q·w2g = γ_c·w2    da = dh·act′(a)

``_input_kernel`` owns BLOCK_M pixels and walks K: dx̂ = da·w1g, and LayerNorm's backward in its epilogue,
du = rstd·(dx̂ − mean(dx̂) − x̂·mean(dx̂·x̂)). ``_weight_kernel`` owns BLOCK_K hidden units and walks a share of the
pixels:

    D = daᵀ·x̂ (K, C)    Eᵀ = hᵀ·dz' (K, C)    db1 = Σ_p da

It computes aᵀ and dhᵀ, so that daᵀ and hᵀ are already the left operands of the second products. The shares' sums are
added in a second pass, in a fixed order. C is cut into parts as in the forward; beyond 128 channels, which only
targets with warp groups support, the parts are narrower, and D and E are sums of two programs.

With the global response norm dh is its gradient at h, and GRN(h) replaces h in E (``grn_bwd.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import activation_and_grad
from ..autotuning import SHARES, Share, fastest
from ..dtypes import dot_precision
from ..folding import Sums
from ..gelu import gelu_form
from ..integers import cdiv
from ..launching import launch
from ..statistics import merge_statistics
from ..targets import target_of
from .fused import load_fc1, load_fc2, load_rows, normalise, store_rows
from .grn import Grn, bias_at, factors_at, row_tiles, rows_of_tile
from .grn_bwd import grn_factors
from .output_grad import output_grad
from .tuning import input_grad_config, norm_blocks, split_width_bwd, weight_grad_config, weights_apart


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """float32 zeros; ``tl.zeros`` takes no width out of a tuple before Triton 3.7."""
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def _scaled(dy_ptr, s, rows, rows_ok, dtype: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """(dz' in float32, dz' in the compute dtype) of rows of dy."""
    dz = load_rows(dy_ptr, rows, rows_ok, C, FIRST, WIDTH).to(tl.float32)
    if s is not None:
        dz *= s[:, None]
    return dz, dz.to(dtype)


@triton.jit
def _store_column_sums(ptr, value, C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    c = FIRST + tl.arange(0, WIDTH)
    tl.store(ptr + c, tl.sum(value, axis=0), mask=c < C)


@triton.jit
def _layernorm_bwd(
    dx, u_ptr, mean, rstd, total, along, du_ptr, rows, rows_ok,
    C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    u = load_rows(u_ptr, rows, rows_ok, C, FIRST, WIDTH).to(tl.float32)
    xhat = (u - mean[:, None]) * rstd[:, None]
    du = (dx - total[:, None] - xhat * along[:, None]) * rstd[:, None]
    store_rows(du_ptr, du, rows, rows_ok, C, FIRST, WIDTH)


@triton.jit
def _along(dx, u_ptr, mean, rstd, rows, rows_ok, C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Σ_c dx̂·x̂ of each row."""
    u = load_rows(u_ptr, rows, rows_ok, C, FIRST, WIDTH).to(tl.float32)
    return tl.sum(dx * ((u - mean[:, None]) * rstd[:, None]), axis=1)


@triton.jit(do_not_specialize=["P", "rows_per_sample"])
def _input_kernel(
    dy_ptr, u_ptr, stats_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, drop_scale_ptr, factors_ptr, du_ptr, dz_ptr, dz_sum_ptr,
    P, rows_per_sample, eps,
    C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr,
    UNIT: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """UNIT: b1 holds q; factors (N, 2, K) of GRN or None; dz (P, C) dz', or None where dy is that already."""
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    BY_SAMPLE: tl.constexpr = factors_ptr is not None
    first, rows_ok, sample = rows_of_tile(pid * BLOCK_M, rows, P, rows_per_sample, BY_SAMPLE, BLOCK_M)
    dy_ptr += first * C
    u_ptr += first * C
    du_ptr += first * C
    dz_sum_ptr += pid * C
    mean, rstd, s = None, None, None
    if NB > 0:
        mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok, P, C, eps, CB, NB)
    if drop_scale_ptr is not None:
        s = tl.load(drop_scale_ptr + (first + rows) // rows_per_sample, mask=rows_ok, other=0.0).to(tl.float32)
    x, dz, dx = (), (), ()
    for i in tl.static_range(len(PARTS)):
        wide, narrow = _scaled(dy_ptr, s, rows, rows_ok, dtype, C, PARTS[i][0], PARTS[i][1])
        _store_column_sums(dz_sum_ptr, wide, C, PARTS[i][0], PARTS[i][1])
        if dz_ptr is not None:
            store_rows(dz_ptr + first * C, narrow, rows, rows_ok, C, PARTS[i][0], PARTS[i][1])
        dz += (narrow,)
        x += (normalise(load_rows(u_ptr, rows, rows_ok, C, PARTS[i][0], PARTS[i][1]), mean, rstd, NB > 0),)
        dx += (_zeros(BLOCK_M, PARTS[i][1]),)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        w1 = ()
        for i in tl.static_range(len(PARTS)):
            w1 += (load_fc1(w1_ptr, k, K, C, PARTS[i][0], PARTS[i][1], BLOCK_K),)
        if a_ptr is not None:
            at = first * K + rows[:, None] * K + k[None, :]
            a = tl.load(a_ptr + at, mask=rows_ok[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        else:
            a = tl.broadcast_to(tl.load(b1_ptr + k, mask=k < K, other=0.0)[None, :], (BLOCK_M, BLOCK_K))
            for i in tl.static_range(len(PARTS)):
                a = tl.dot(x[i], w1[i].T, a, input_precision=PRECISION)
        dh = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for i in tl.static_range(len(PARTS)):
            w2 = load_fc2(w2_ptr, k, K, C, PARTS[i][0], PARTS[i][1], BLOCK_K)
            dh = tl.dot(dz[i], w2, dh, input_precision=PRECISION)
        h, slope = activation_and_grad(a, ACT, FORM)
        if UNIT:
            dh *= tl.load(b1_ptr + 2 * K)
        if factors_ptr is not None:
            scale, pull = factors_at(factors_ptr, sample, k, K)
            dh = tl.fma(dh, scale[None, :], h * pull[None, :])
        da = (dh * slope).to(dtype)
        sums = ()
        for i in tl.static_range(len(PARTS)):
            sums += (tl.dot(da, w1[i], dx[i], input_precision=PRECISION),)
        dx = sums
    if NB > 0:
        total = tl.zeros((BLOCK_M,), tl.float32)
        along = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(len(PARTS)):
            total += tl.sum(dx[i], axis=1)
            along += _along(dx[i], u_ptr, mean, rstd, rows, rows_ok, C, PARTS[i][0], PARTS[i][1])
        total, along = total * (1.0 / C), along * (1.0 / C)
        for i in tl.static_range(len(PARTS)):
            _layernorm_bwd(
                dx[i], u_ptr, mean, rstd, total, along, du_ptr, rows, rows_ok, C, PARTS[i][0], PARTS[i][1]
            )  # fmt: skip
    else:
        for i in tl.static_range(len(PARTS)):
            store_rows(du_ptr, dx[i], rows, rows_ok, C, PARTS[i][0], PARTS[i][1])


@triton.jit
def _store_weights(ptr, value, k, K: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    c = FIRST + tl.arange(0, WIDTH)
    tl.store(ptr + k[:, None] * C + c[None, :], value, mask=(k < K)[:, None] & (c < C)[None, :])


@triton.jit
def _share_of_weights(
    dz_ptr, u_ptr, stats_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, factors_ptr, grn_bias_ptr,
    D_ptr, E_ptr, db1_ptr, P, rows_per_sample, share, eps, k, split,
    C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, UNIT: tl.constexpr,
    ACT: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    WANTS_D: tl.constexpr, WANTS_E: tl.constexpr,
):  # fmt: skip
    """D and db1, or E, or all, of hidden units ``k`` over share number ``split`` of the pixels."""
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    w1, w2, D, E = (), (), (), ()
    for i in tl.static_range(len(PARTS)):
        w1 += (load_fc1(w1_ptr, k, K, C, PARTS[i][0], PARTS[i][1], BLOCK_K),)
        w2 += (load_fc2(w2_ptr, k, K, C, PARTS[i][0], PARTS[i][1], BLOCK_K).T,)
        D += (_zeros(BLOCK_K, PARTS[i][1]),)
        E += (_zeros(BLOCK_K, PARTS[i][1]),)
    bias = tl.load(b1_ptr + k, mask=k < K, other=0.0)
    db1 = tl.zeros((BLOCK_K,), tl.float32)
    rows = tl.arange(0, BLOCK_M)
    for start in range(0, share, BLOCK_M):
        first = split * share + start
        first, rows_ok, sample = rows_of_tile(first, rows, P, rows_per_sample, factors_ptr is not None, BLOCK_M)
        u = u_ptr + first * C
        mean, rstd = None, None
        if NB > 0:
            mean, rstd = merge_statistics(stats_ptr, first + rows, rows_ok, P, C, eps, CB, NB)
        x, dz = (), ()
        for i in tl.static_range(len(PARTS)):
            x += (normalise(load_rows(u, rows, rows_ok, C, PARTS[i][0], PARTS[i][1]), mean, rstd, NB > 0),)
            dz += (load_rows(dz_ptr + first * C, rows, rows_ok, C, PARTS[i][0], PARTS[i][1]),)
        if a_ptr is not None:
            at = first * K + rows[:, None] * K + k[None, :]
            a = tl.load(a_ptr + at, mask=rows_ok[:, None] & (k < K)[None, :], other=0.0).T.to(tl.float32)
        else:
            a = tl.broadcast_to(bias[:, None], (BLOCK_K, BLOCK_M))
            for i in tl.static_range(len(PARTS)):
                a = tl.dot(w1[i], x[i].T, a, input_precision=PRECISION)
        h, slope = activation_and_grad(a, ACT, FORM)
        if factors_ptr is not None:
            h = tl.where(rows_ok[None, :], h, 0.0)
            scale, pull = factors_at(factors_ptr, sample, k, K)
        if WANTS_D:
            dh = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
            for i in tl.static_range(len(PARTS)):
                dh = tl.dot(w2[i], dz[i].T, dh, input_precision=PRECISION)
            if UNIT:
                dh *= tl.load(b1_ptr + 2 * K)
            if factors_ptr is not None:
                dh = tl.fma(dh, scale[:, None], h * pull[:, None])
            da = dh * slope
            db1 += tl.sum(da, axis=1)
            D_sums = ()
            for i in tl.static_range(len(PARTS)):
                D_sums += (tl.dot(da.to(dtype), x[i], D[i], input_precision=PRECISION),)
            D = D_sums
        if WANTS_E:
            if factors_ptr is not None:
                h = tl.fma(h, scale[:, None], bias_at(grn_bias_ptr, k, K)[:, None])
            E_sums = ()
            for i in tl.static_range(len(PARTS)):
                E_sums += (tl.dot(h.to(dtype), dz[i], E[i], input_precision=PRECISION),)
            E = E_sums
    if WANTS_D:
        tl.store(db1_ptr + split * K + k, db1, mask=k < K)
        for i in tl.static_range(len(PARTS)):
            _store_weights(D_ptr + split * K * C, D[i], k, K, C, PARTS[i][0], PARTS[i][1])
    if WANTS_E:
        for i in tl.static_range(len(PARTS)):
            _store_weights(E_ptr + split * K * C, E[i], k, K, C, PARTS[i][0], PARTS[i][1])


@triton.jit(do_not_specialize=["P", "rows_per_sample", "share"])
def _weight_kernel(
    dz_ptr, u_ptr, stats_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, factors_ptr, grn_bias_ptr,
    D_ptr, E_ptr, db1_ptr, P, rows_per_sample, share, eps,
    C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, UNIT: tl.constexpr,
    ACT: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of hidden units, shares). APART: D and E are two programs, for the sums of both need too many
    registers; they compute a each for itself, five products in the place of four.
    """
    split = tl.program_id(1).to(tl.int64)
    if APART:
        k = tl.program_id(0) // 2 * BLOCK_K + tl.arange(0, BLOCK_K)
        if tl.program_id(0) % 2 == 0:
            _share_of_weights(
                dz_ptr, u_ptr, stats_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, factors_ptr, grn_bias_ptr,
                D_ptr, E_ptr, db1_ptr, P, rows_per_sample, share, eps, k, split, C, K, PARTS, CB, NB, UNIT, ACT, FORM,
                PRECISION, BLOCK_M, BLOCK_K, True, False,
            )  # fmt: skip
        else:
            _share_of_weights(
                dz_ptr, u_ptr, stats_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, factors_ptr, grn_bias_ptr,
                D_ptr, E_ptr, db1_ptr, P, rows_per_sample, share, eps, k, split, C, K, PARTS, CB, NB, UNIT, ACT, FORM,
                PRECISION, BLOCK_M, BLOCK_K, False, True,
            )  # fmt: skip
    else:
        k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        _share_of_weights(
            dz_ptr, u_ptr, stats_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, factors_ptr, grn_bias_ptr,
            D_ptr, E_ptr, db1_ptr, P, rows_per_sample, share, eps, k, split, C, K, PARTS, CB, NB, UNIT, ACT, FORM,
            PRECISION, BLOCK_M, BLOCK_K, True, True,
        )  # fmt: skip


def fused_mlp_bwd(dy, u, stats, a, w1g, b1g, w2g, drop_scale, eps, act, grn: Grn | None = None) -> tuple[Tensor, Sums]:
    """``mlp_bwd`` with the same arguments, with h and da on the chip, for any width; P > 0."""
    P, C = u.shape
    K = w1g.shape[0]
    target = target_of(u)
    CB, NB = norm_blocks(stats, C, u.dtype)
    factors, grads, samples = None, None, None
    if grn is not None:
        dy, drop_scale, samples = output_grad(dy, drop_scale, u.dtype)[0], None, grn.samples
        factors, grads = grn_factors(dy, u, stats, a, w1g, b1g, w2g, eps, act, grn)
    per_sample = P // (samples or (1 if drop_scale is None else drop_scale.numel()))
    values, grn_bias = factors or (None, None)
    shape = {"C": C, "K": K, "PARTS": split_width_bwd(C, target), "CB": CB, "NB": NB, "UNIT": b1g.shape[0] == 3}
    shape |= {"ACT": act, "FORM": gelu_form(u.dtype), "PRECISION": dot_precision(u.dtype)}
    du = u.new_empty(u.shape)
    dz, half = None if drop_scale is None and dy.dtype == u.dtype else u.new_empty(u.shape), u.dtype == torch.float16
    config = input_grad_config(C, u.dtype, target, grn is not None)
    programs = row_tiles(P, samples, config.BLOCK_M)
    dz_sum = u.new_empty((programs, C), dtype=torch.float32)
    launch(
        _input_kernel, (programs,),
        dy, u, stats, a, w1g, b1g, w2g, drop_scale, values, du, dz, dz_sum, P, per_sample, eps,
        **shape, **config.__dict__,
    )  # fmt: skip
    dz = dy if dz is None else dz
    config, share = weight_grad_config(P, C, K, target, a is not None, half, grn is not None)
    apart = weights_apart(C)

    def weights(part: Share) -> Sums:
        rows = part.of(share, config.BLOCK_M)
        splits = cdiv(row_tiles(P, samples, config.BLOCK_M) * config.BLOCK_M, rows)
        products = u.new_empty((2, splits, K, C), dtype=torch.float32)
        db1 = u.new_empty((splits, K), dtype=torch.float32)
        launch(
            _weight_kernel, (cdiv(K, config.BLOCK_K) * (2 if apart else 1), splits),
            dz, u, stats, a, w1g, b1g, w2g, values, grn_bias, *products, db1, P, per_sample, rows, eps,
            APART=apart, **shape, **config.__dict__,
        )  # fmt: skip
        return Sums(products, db1, None, dz_sum, grads)

    return du, weights(fastest(_weight_kernel, weights, SHARES, u, P, (C, K, act, a is None)))
