"""LayerNorm's affine and γ folded into the linear layers, and the parameter gradients that follow from two products.

Forward, for w1 (K, C), b1 (K,), g and β of LayerNorm (C,), w2 (C, K), γ (C,):

    w1g = w1∘g, rounded to the compute dtype    b1g = b1 + w1·β    s_k = Σ_c w1g[k, c]    w2g = γ_c·w2, rounded likewise

s lets a GEMM normalise in its epilogue: x̂·w1gᵀ = rstd·(u·w1gᵀ − μ·s). It is summed over the rounded weights, so that
the mean cancels. γ starts at 1e-6, so γ·w2 would underflow in float16. There w2g is γ·w2/q for a power of two,
q ≤ max |γ| < 2q, and a product with w2g is multiplied by q.

Backward, from D = Σ_p da_k x̂_c (K, C), db1 = Σ_p da_k, E = Σ_p dz'_c h_k (C, K), dz' the gradient of fc2's output
without γ, and dz_sum = Σ_p dz'_c:

    dw1 = D∘g + db1⊗β      dg_c = Σ_k w1[k, c]·D[k, c]      dβ_c = Σ_k w1[k, c]·db1_k
    dw2 = γ_c·E            db2 = γ_c·dz_sum                  dγ_c = Σ_k w2[c, k]·E[c, k] + b2_c·dz_sum_c

The sums over p come as partial sums (``Sums``). One launch adds them up and writes dw1, db1 and dw2, and partial sums
over k, one for each tile of hidden units. A second launch adds those up, and also the partial sums of the depthwise
convolution's gradients. Every gradient is rounded once, to the dtype of its parameter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dwconv.wgrad import SLOTS, add_taps
from .integers import cdiv
from .launching import launch
from .weights import BlockWeights

BLOCK_K = 32  # hidden units of a tile of the backward


class Sums(NamedTuple):
    """Partial sums over the pixels, float32, whose first axes (of ``products`` the second) a later launch adds up.

    products: (2, S, K, C), D and the transpose of E; db1: (T, K); centre: (T, K) or None, to be subtracted from D in
    every channel; dz: (R, C) of any float dtype, dz_sum; grn: (N, 2, K), of the global response norm's weight and bias,
    or None.
    """

    products: Tensor
    db1: Tensor
    centre: Tensor | None
    dz: Tensor
    grn: Tensor | None = None


@triton.jit
def _fold_fwd_kernel(
    w1_ptr, b1_ptr, g_ptr, beta_ptr, w2_ptr, gamma_ptr, w1g_ptr, b1g_ptr, w2g_ptr, K, C,
    UNIT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """w2g is written if needed; UNIT: divided by q."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inverse = 1.0
    if UNIT:
        most = tl.zeros((BLOCK_C,), tl.float32)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            most = tl.maximum(most, tl.abs(tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)))
        # The exponent of the largest, as float32 holds it, clamped so that neither q nor 1/q overflows.
        exponent = tl.minimum(tl.maximum(tl.max(most, axis=0).to(tl.int32, bitcast=True) >> 23, 1), 253)
        unit = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(b1g_ptr + 2 * K + k, tl.zeros((BLOCK_K,), tl.float32) + unit, mask=k < K)
    bias = tl.zeros((BLOCK_K,), tl.float32)
    row_sum = tl.zeros((BLOCK_K,), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        ok = (k < K)[:, None] & (c < C)[None, :]
        at = k[:, None].to(tl.int64) * C + c[None, :]
        w = tl.load(w1_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if beta_ptr is not None:
            bias += tl.sum(w * tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :], axis=1)
        if g_ptr is not None:
            w = w * tl.load(g_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        rounded = w.to(w1g_ptr.dtype.element_ty)
        row_sum += tl.sum(rounded.to(tl.float32), axis=1)
        tl.store(w1g_ptr + at, rounded, mask=ok)
        if w2g_ptr is not None:
            at = c[None, :].to(tl.int64) * K + k[:, None]
            w = tl.load(w2_ptr + at, mask=ok, other=0.0).to(tl.float32)
            if gamma_ptr is not None:
                w = w * (tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32) * inverse)[None, :]
            tl.store(w2g_ptr + at, w.to(w2g_ptr.dtype.element_ty), mask=ok)
    if b1_ptr is not None:
        bias += tl.load(b1_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(b1g_ptr + k, bias, mask=k < K)
    tl.store(b1g_ptr + K + k, row_sum, mask=k < K)


@triton.jit
def add_rows(ptr, first, end, j, j_ok, N, ROWS: tl.constexpr):
    """Σ in float32 of the rows ``first`` to ``end`` of a (·, N) matrix, at the columns ``j``."""
    total = tl.zeros((ROWS, j.shape[0]), tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * N + j[None, :]
        total += tl.load(ptr + at, mask=(row < end)[:, None] & j_ok[None, :], other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _fold_bwd_kernel(
    products_ptr, db1_sums_ptr, centre_ptr, dz_ptr, grn_sums_ptr, w1_ptr, w2_ptr, g_ptr, beta_ptr, gamma_ptr,
    dw1_ptr, db1_ptr, dw2_ptr, dgrn_weight_ptr, dgrn_bias_ptr, partial_ptr, K, C, S, T, R, N,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (⌈K/BLOCK_K⌉, ⌈C/BLOCK_C⌉). partial: (⌈K/BLOCK_K⌉, 4, C): of dg, dβ, Σ_k w2·E and dz_sum."""
    tile = tl.program_id(0)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k_ok = k < K
    c_ok = c < C
    ok = k_ok[:, None] & c_ok[None, :]
    at = k[:, None].to(tl.int64) * C + c[None, :]
    D = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    E = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    size = (tl.zeros((), tl.int64) + K) * C
    for s in tl.range(0, S, loop_unroll_factor=2):  # so that four loads are on their way
        D += tl.load(products_ptr + s * size + at, mask=ok, other=0.0)
        E += tl.load(products_ptr + (S + s) * size + at, mask=ok, other=0.0)
    if centre_ptr is not None:
        D -= add_rows(centre_ptr, 0, T, k, k_ok, K, 8)[:, None]
    db1 = add_rows(db1_sums_ptr, 0, T, k, k_ok, K, 8)
    if db1_ptr is not None:  # noqa: SIM102 (decided at compile time)
        if tl.program_id(1) == 0:
            tl.store(db1_ptr + k, db1.to(db1_ptr.dtype.element_ty), mask=k_ok)
    if grn_sums_ptr is not None:  # noqa: SIM102
        if tl.program_id(1) == 0:
            dweight = add_rows(grn_sums_ptr, 0, N, k, k_ok, 2 * K, 8)
            tl.store(dgrn_weight_ptr + k, dweight.to(dgrn_weight_ptr.dtype.element_ty), mask=k_ok)
            dbias = add_rows(grn_sums_ptr + K, 0, N, k, k_ok, 2 * K, 8)
            tl.store(dgrn_bias_ptr + k, dbias.to(dgrn_bias_ptr.dtype.element_ty), mask=k_ok)

    w1 = tl.load(w1_ptr + at, mask=ok, other=0.0).to(tl.float32)
    dg = tl.sum(w1 * D, axis=0)
    dbeta = tl.sum(w1 * db1[:, None], axis=0)
    if g_ptr is not None:
        D *= tl.load(g_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    if beta_ptr is not None:
        D = tl.fma(db1[:, None], tl.load(beta_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :], D)
    tl.store(dw1_ptr + at, D.to(dw1_ptr.dtype.element_ty), mask=ok)

    at = c[None, :].to(tl.int64) * K + k[:, None]
    w2 = tl.load(w2_ptr + at, mask=ok, other=0.0).to(tl.float32)
    dgamma = tl.sum(w2 * E, axis=0)
    if gamma_ptr is not None:
        E *= tl.load(gamma_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    tl.store(dw2_ptr + at, E.to(dw2_ptr.dtype.element_ty), mask=ok)

    partial_ptr += tile.to(tl.int64) * 4 * C + c
    tl.store(partial_ptr, dg, mask=c_ok)
    tl.store(partial_ptr + C, dbeta, mask=c_ok)
    tl.store(partial_ptr + 2 * C, dgamma, mask=c_ok)
    rows = tl.cdiv(R, tl.num_programs(0))
    dz_sum = add_rows(dz_ptr, tile * rows, tl.minimum(tile * rows + rows, R), c, c_ok, C, 32)
    tl.store(partial_ptr + 3 * C, dz_sum, mask=c_ok)


@triton.jit
def _vectors(
    partial_ptr, b2_ptr, gamma_ptr, dg_ptr, dbeta_ptr, db2_ptr, dgamma_ptr, c, C, TILES
):  # fmt: skip
    """The gradients that are vectors, at the channels ``c``; partial: (TILES, 4, C) of ``_fold_bwd_kernel``."""
    ok = c < C
    if dg_ptr is not None:
        tl.store(dg_ptr + c, add_rows(partial_ptr, 0, TILES, c, ok, 4 * C, 8).to(dg_ptr.dtype.element_ty), mask=ok)
    if dbeta_ptr is not None:
        dbeta = add_rows(partial_ptr + C, 0, TILES, c, ok, 4 * C, 8)
        tl.store(dbeta_ptr + c, dbeta.to(dbeta_ptr.dtype.element_ty), mask=ok)
    dz_sum = add_rows(partial_ptr + 3 * C, 0, TILES, c, ok, 4 * C, 8)
    if dgamma_ptr is not None:
        dgamma = add_rows(partial_ptr + 2 * C, 0, TILES, c, ok, 4 * C, 8)
        if b2_ptr is not None:
            dgamma = tl.fma(tl.load(b2_ptr + c, mask=ok, other=0.0).to(tl.float32), dz_sum, dgamma)
        tl.store(dgamma_ptr + c, dgamma.to(dgamma_ptr.dtype.element_ty), mask=ok)
    if db2_ptr is not None:
        if gamma_ptr is not None:
            dz_sum *= tl.load(gamma_ptr + c, mask=ok, other=0.0).to(tl.float32)
        tl.store(db2_ptr + c, dz_sum.to(db2_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _finish_kernel(
    partial_ptr, b2_ptr, gamma_ptr, dg_ptr, dbeta_ptr, db2_ptr, dgamma_ptr, dwconv_ptr, dw_ptr, db_ptr,
    C, TILES, SPLITS, TAPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (⌈C/BLOCK_C⌉, 1 + TAPS·SLOTS), or (⌈C/BLOCK_C⌉, 1) without the depthwise convolution."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = tl.program_id(1) - 1
    if slot < 0:
        _vectors(partial_ptr, b2_ptr, gamma_ptr, dg_ptr, dbeta_ptr, db2_ptr, dgamma_ptr, c, C, TILES)
    elif dwconv_ptr is not None:
        add_taps(dwconv_ptr, dw_ptr, db_ptr, c, slot, C, SPLITS, TAPS, SLOTS, BLOCK_C, 4)


def fold_fwd(weights: BlockWeights, dtype: torch.dtype, layer_scale: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(w1g (K, C) in ``dtype``, b1g (2 or 3, K) float32, w2g (C, K) in ``dtype``), with γ in w2g if ``layer_scale``.

    The rows of b1g are the folded bias, the row sums s and, for float16 with γ, q in every column: a product with w2g
    must be multiplied by it.

    The weights are contiguous; a vector that is None is the identity. w2g is ``w2`` itself if nothing changes it. One
    launch.
    """
    K, C = weights.w1.shape
    gamma = weights.gamma if layer_scale else None
    w1g = weights.w1.new_empty((K, C), dtype=dtype)
    unit = gamma is not None and dtype == torch.float16
    b1g = w1g.new_empty((3 if unit else 2, K), dtype=torch.float32)
    same = gamma is None and weights.w2.dtype == dtype
    w2g = None if same else w1g.new_empty((C, K))
    launch(
        _fold_fwd_kernel, (cdiv(K, 16),),
        weights.w1, weights.b1, weights.ln_weight, weights.ln_bias, weights.w2, gamma, w1g, b1g, w2g, K, C,
        UNIT=unit, BLOCK_K=16, BLOCK_C=128, num_warps=8 if unit else 4,  # 4 would spill on sm_100 at 1,024 channels
    )  # fmt: skip
    return w1g, b1g, weights.w2 if w2g is None else w2g


def fold_bwd(
    sums: Sums, weights: BlockWeights, dwconv_sums: Tensor | None = None, out: BlockWeights | None = None
) -> BlockWeights:
    """Gradients of the weights, which are contiguous.

    ``dwconv_sums``: ``dwconv_wgrad_partials``, or None if the depthwise convolution's gradients are not needed. A
    gradient is like its parameter, None if that is None. ``out``: memory for them. Two launches.
    """
    if dwconv_sums is None:
        weights = weights._replace(dwconv_weight=None, dwconv_bias=None)
    (K, C), (_, S, *_) = weights.w1.shape, sums.products.shape
    grads = out
    if grads is None:
        grads = BlockWeights(*(None if p is None else p.new_empty(p.shape) for p in weights))
    w1, w2, b2, gamma = weights.w1, weights.w2, weights.b2, weights.gamma
    tiles = cdiv(K, BLOCK_K)
    partial = w1.new_empty((tiles, 4, C), dtype=torch.float32)
    num_warps = 8 if w1.dtype == torch.float16 or sums.grn is not None else 4  # 4 would spill on sm_120 and sm_100
    launch(
        _fold_bwd_kernel, (tiles, cdiv(C, 64)),
        *sums, w1, w2, weights.ln_weight, weights.ln_bias, gamma, grads.w1, grads.b1, grads.w2, grads.grn_weight,
        grads.grn_bias, partial, K, C, S, sums.db1.shape[0], sums.dz.shape[0], 0 if sums.grn is None else len(sums.grn),
        BLOCK_K=BLOCK_K, BLOCK_C=64, num_warps=num_warps,
    )  # fmt: skip
    splits, taps = (0, 0) if dwconv_sums is None else dwconv_sums.shape[:2]
    launch(
        _finish_kernel, (cdiv(C, 32), 1 + taps * SLOTS),
        partial, b2, gamma, grads.ln_weight, grads.ln_bias, grads.b2, grads.gamma,
        dwconv_sums, grads.dwconv_weight, grads.dwconv_bias, C, tiles, splits,
        TAPS=taps, SLOTS=SLOTS, BLOCK_C=32, num_warps=1,
    )  # fmt: skip
    return grads
