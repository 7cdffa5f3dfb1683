"""Convolutions of non-overlapping patches: the stem (then LayerNorm) and the downsampling layers (after LayerNorm).

Stem, image (N, Cin, H, W) of any strides, k×k patches, one kernel; a program holds all C channels of its pixels:

    u = Σ_{i, dy, dx} image[n, i, k·y + dy, k·x + dx]·w[c, i, dy, dx] + b        out = (u − μ)·rstd·g + β

Downsampling, x (N, H, W, C), one GEMM whose depth runs over the k·k taps and C; LayerNorm's affine is folded into the
weights, its statistics are taken from the rows that a program is about to multiply:

    out = Σ_taps x̂[n, k·y + dy, k·x + dx]·wg[tap]ᵀ + bg        wg = w∘g        bg = b + Σ w·β

H and W that k does not divide lose their last rows and columns, as in the strided convolution. The backwards are in
``bwd.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import TL_DTYPES, dot_precision
from ..integers import cdiv
from ..launching import launch
from ..mlp.tuning import downsample_config, stem_config
from ..statistics import inverse_deviation
from ..targets import target_of


@triton.jit
def stem_corners(rows, HO, WO, stride_n, stride_h, stride_w, KH: tl.constexpr, KW: tl.constexpr):
    """Offsets of the first pixels of the patches ``rows``, 64-bit indices into (N, HO, WO)."""
    return rows // WO // HO * stride_n + rows // WO % HO * KH * stride_h + rows % WO * KW * stride_w


@triton.jit
def stem_taps(k, stride_i, stride_h, stride_w, KH: tl.constexpr, KW: tl.constexpr):
    """Offsets within a patch of its elements ``k``, indices into (CIN, KH, KW)."""
    return (k // (KH * KW)).to(tl.int64) * stride_i + (k // KW % KH) * stride_h + (k % KW) * stride_w


@triton.jit
def _stem_step(
    u, k0, image_ptr, w_ptr, corner, rows_ok, c, c_ok, stride_i, stride_h, stride_w, dtype: tl.constexpr,
    DEPTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """u and the product of the elements k0, … of the patches and their weights."""
    k = k0 + tl.arange(0, BLOCK_K)
    k_ok = k < DEPTH
    at = corner[:, None] + stem_taps(k, stride_i, stride_h, stride_w, KH, KW)[None, :]
    patch = tl.load(image_ptr + at, mask=rows_ok[:, None] & k_ok[None, :], other=0.0)
    w = tl.load(w_ptr + c[None, :] * DEPTH + k[:, None], mask=k_ok[:, None] & c_ok[None, :], other=0.0)
    return tl.dot(patch.to(dtype), w.to(dtype), u, input_precision=PRECISION)


@triton.jit
def stem_activations(
    image_ptr, w_ptr, b_ptr, corner, rows_ok, c, c_ok, stride_i, stride_h, stride_w, dtype: tl.constexpr,
    C: tl.constexpr, CIN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(u − μ, Σ (u − μ)²) of the patches at the offsets ``corner``, float32; columns past C are 0.

    In 16 bits the steps are a loop: a product in the same region as one that takes its result, as the backward's does,
    would give every warp whole rows, and so all channels.
    """
    DEPTH: tl.constexpr = CIN * KH * KW
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if dtype == tl.float32:
        for k0 in tl.static_range(0, DEPTH, BLOCK_K):
            u = _stem_step(
                u, k0, image_ptr, w_ptr, corner, rows_ok, c, c_ok, stride_i, stride_h, stride_w, dtype,
                DEPTH, KH, KW, PRECISION, BLOCK_K,
            )  # fmt: skip
    else:
        for k0 in range(0, DEPTH, BLOCK_K):
            u = _stem_step(
                u, k0, image_ptr, w_ptr, corner, rows_ok, c, c_ok, stride_i, stride_h, stride_w, dtype,
                DEPTH, KH, KW, PRECISION, BLOCK_K,
            )  # fmt: skip
    if b_ptr is not None:
        u += tl.load(b_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(u, axis=1) * (1.0 / C)
    centred = tl.where(c_ok[None, :], u - mean[:, None], 0.0)
    return centred, tl.sum(centred * centred, axis=1)


@triton.jit(do_not_specialize=["P"])
def _stem_kernel(
    image_ptr, w_ptr, b_ptr, g_ptr, beta_ptr, out_ptr, P, HO, WO, stride_n, stride_i, stride_h, stride_w, eps,
    C: tl.constexpr, CIN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr,
    dtype: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out: (P, C), P = N·HO·WO; w: (C, CIN·KH·KW)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < P
    corner = stem_corners(rows, HO, WO, stride_n, stride_h, stride_w, KH, KW)
    c = tl.arange(0, BLOCK_N)
    c_ok = c < C
    centred, m2 = stem_activations(
        image_ptr, w_ptr, b_ptr, corner, rows_ok, c, c_ok, stride_i, stride_h, stride_w, dtype,
        C, CIN, KH, KW, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    out = centred * inverse_deviation(m2 * (1.0 / C), eps)[:, None]
    out *= tl.load(g_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    out += tl.load(beta_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None] * C + c[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=rows_ok[:, None] & c_ok[None, :])


@triton.jit
def row_statistics(ptr, rows_ok, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """(mean, M2) of the BLOCK_M rows of C channels at the addresses ``ptr``, chunks merged as in statistics.py."""
    mean = tl.zeros((BLOCK_M,), tl.float32)
    m2 = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        count = tl.minimum(C - first, BLOCK_C).to(tl.float32)
        x = tl.load(ptr[:, None] + c[None, :], mask=rows_ok[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        chunk_mean = tl.sum(x, axis=1) / count
        centred = tl.where((c < C)[None, :], x - chunk_mean[:, None], 0.0)
        delta = chunk_mean - mean
        share = count / (first + count)
        mean += delta * share
        m2 += tl.sum(centred * centred, axis=1) + delta * delta * (first * share)
    return mean, m2


@triton.jit
def _fold_kernel(
    w_ptr, b_ptr, g_ptr, beta_ptr, wg_ptr, bg_ptr,
    C: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row of output channel ``pid``: wg[pid, tap, c] = w[pid, c, tap]·g[c], bg[pid] = b[pid] + Σ w·β."""
    pid = tl.program_id(0).to(tl.int64)
    bias = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, C * TAPS, BLOCK):
        i = first + tl.arange(0, BLOCK)
        ok = i < C * TAPS
        tap, c = i // C, i % C
        w = tl.load(w_ptr + pid * C * TAPS + c * TAPS + tap, mask=ok, other=0.0).to(tl.float32)
        bias += w * tl.load(beta_ptr + c, mask=ok, other=0.0).to(tl.float32)
        w *= tl.load(g_ptr + c, mask=ok, other=0.0).to(tl.float32)
        tl.store(wg_ptr + pid * C * TAPS + i, w.to(wg_ptr.dtype.element_ty), mask=ok)
    total = tl.sum(bias, axis=0)
    if b_ptr is not None:
        total += tl.load(b_ptr + pid).to(tl.float32)
    tl.store(bg_ptr + pid, total)


@triton.jit(do_not_specialize=["P"])
def _downsample_kernel(
    x_ptr, w_ptr, b_ptr, out_ptr, P, H, W, HO, WO, eps,
    C: tl.constexpr, N: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x: (·, H, W, C); w: (N, KH·KW·C); out: (P, N), P = ·HO·WO."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rows = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < P
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N
    corner = x_ptr + ((rows // WO // HO * H + rows // WO % HO * KH) * W + rows % WO * KW) * C
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for dy in range(KH):
        for dx in range(KW):
            pixel = corner + (dy * W + dx) * C
            mean, m2 = row_statistics(pixel, rows_ok, C, BLOCK_M, BLOCK_K)
            rstd = inverse_deviation(m2 * (1.0 / C), eps)
            for k0 in range(0, C, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                k_ok = k < C
                x = tl.load(pixel[:, None] + k[None, :], mask=rows_ok[:, None] & k_ok[None, :], other=0.0)
                x = ((x.to(tl.float32) - mean[:, None]) * rstd[:, None]).to(dtype)
                at = n[:, None] * (KH * KW * C) + (dy * KW + dx) * C + k[None, :]
                w = tl.load(w_ptr + at, mask=n_ok[:, None] & k_ok[None, :], other=0.0)
                out = tl.dot(x, w.T, out, input_precision=PRECISION)
    out += tl.load(b_ptr + n, mask=n_ok, other=0.0)[None, :]
    at = rows[:, None] * N + n[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=rows_ok[:, None] & n_ok[None, :])


def stem_fwd(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """out (N, ⌊H/kh⌋, ⌊W/kw⌋, C) in ``out_dtype``, computed in ``dtype``.

    image (N, Cin, H, W) of any strides and float dtype; weight (C, Cin, kh, kw) contiguous; the vectors (C,).
    """
    N, CIN, H, W = image.shape
    C, _, KH, KW = weight.shape
    HO, WO = H // KH, W // KW
    P = N * HO * WO
    out = image.new_empty((N, HO, WO, C), dtype=out_dtype)
    config = stem_config(C)
    launch(
        _stem_kernel, (cdiv(P, config.BLOCK_M),),
        image, weight, bias, ln_weight, ln_bias, out, P, HO, WO, *image.stride(), eps,
        C=C, CIN=CIN, KH=KH, KW=KW, PRECISION=dot_precision(dtype), dtype=TL_DTYPES[dtype], **config.__dict__,
    )  # fmt: skip
    return out


def fold_downsample(
    weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(wg (C', kh, kw, C) in ``dtype``, bg (C',) float32) from weight (C', C, kh, kw) and LayerNorm's affine."""
    N, C, KH, KW = weight.shape
    wg = weight.new_empty((N, KH, KW, C), dtype=dtype)
    bg = weight.new_empty(N, dtype=torch.float32)
    launch(_fold_kernel, (N,), weight, bias, ln_weight, ln_bias, wg, bg, C=C, TAPS=KH * KW, BLOCK=512)
    return wg, bg


def downsample_fwd(x: Tensor, wg: Tensor, bg: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """out (N, ⌊H/kh⌋, ⌊W/kw⌋, C') in ``out_dtype``, computed in the dtype of wg.

    x (N, H, W, C) contiguous, any float dtype; wg (C', kh, kw, C) and bg (C',) from ``fold_downsample``.
    """
    B, H, W, C = x.shape
    N, KH, KW, _ = wg.shape
    HO, WO = H // KH, W // KW
    P = B * HO * WO
    out = x.new_empty((B, HO, WO, N), dtype=out_dtype)
    config = downsample_config(P, N, wg.dtype, x.dtype != wg.dtype, target_of(x))
    launch(
        _downsample_kernel, (cdiv(P, config.BLOCK_M) * cdiv(N, config.BLOCK_N),),
        x, wg, bg, out, P, H, W, HO, WO, eps,
        C=C, N=N, KH=KH, KW=KW, PRECISION=dot_precision(wg.dtype), **config.__dict__,
    )  # fmt: skip
    return out
