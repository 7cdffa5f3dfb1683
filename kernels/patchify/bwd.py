"""Backward of the convolutions of non-overlapping patches: the stem and the downsampling layers.

Stem (patch convolution, then LayerNorm). One kernel recomputes u, which reads less than a saved u, and computes from
dout (P, C) and the image, with one share of the patches per program,

    dx̂ = dout·g    du = rstd·(dx̂ − mean(dx̂) − x̂·mean(dx̂·x̂))    dw = duᵀ·patches    db = Σ du    dg = Σ dout·x̂
    dβ = Σ dout

Downsampling (LayerNorm, then patch convolution with wg = w∘g), dz (P, C') the gradient of its output, per tap:

    dz in the compute dtype, db = Σ_p dz                                                     mlp/output_grad.py
    dx̂[tap] = dz·wg[tap]    dx = LayerNorm's backward of it    x̂[tap], by patches            _downsample_input_kernel
    D[tap] = dzᵀ·x̂[tap] (C', C)    and, of a tile, Σ_n w[n, c, tap]·D[tap]                   _downsample_weight_kernel
    dw = D∘g + db⊗β    dg_c = Σ_{n, tap} w·D    dβ_c = Σ_{n, tap} w·db_n                      _downsample_fold_kernel

Sums over pixels are partial sums, one per share, which the last launch adds in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autotuning import SHARES, Share, fastest
from ..dtypes import TL_DTYPES, dot_precision
from ..folding import add_rows
from ..integers import cdiv
from ..launching import launch
from ..mlp.gemm_bwd import product_over_pixels
from ..mlp.output_grad import output_grad
from ..mlp.tuning_bwd import downsample_input_config, downsample_weight_config, stem_bwd_config
from ..statistics import inverse_deviation
from ..targets import target_of
from .fwd import fold_downsample, row_statistics, stem_activations, stem_corners, stem_taps


@triton.jit(do_not_specialize=["P", "share"])
def _stem_bwd_kernel(
    image_ptr, w_ptr, b_ptr, g_ptr, dout_ptr, dimage_ptr, sums_ptr, P, share, HO, WO,
    stride_n, stride_i, stride_h, stride_w, dstride_n, dstride_i, dstride_h, dstride_w, eps,
    C: tl.constexpr, CIN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr,
    dtype: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (shares, ⌈CIN·KH·KW/BLOCK_D⌉): BLOCK_D elements of a patch a program; dimage is written if wanted.

    sums: (shares, C·CIN·KH·KW + 3·C), of dw, db, dg and dβ.
    """
    DEPTH: tl.constexpr = CIN * KH * KW
    c = tl.arange(0, BLOCK_N)
    c_ok = c < C
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_ok = d < DEPTH
    taps = stem_taps(d, stride_i, stride_h, stride_w, KH, KW)
    g = tl.load(g_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    db = tl.zeros((BLOCK_N,), tl.float32)
    dg = tl.zeros((BLOCK_N,), tl.float32)
    dbeta = tl.zeros((BLOCK_N,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * share
    for start in tl.range(0, share, BLOCK_M, disable_licm=True):  # hoisted weights would spill
        rows = first + start + tl.arange(0, BLOCK_M)
        rows_ok = rows < P
        corner = stem_corners(rows, HO, WO, stride_n, stride_h, stride_w, KH, KW)
        centred, m2 = stem_activations(
            image_ptr, w_ptr, b_ptr, corner, rows_ok, c, c_ok, stride_i, stride_h, stride_w, dtype,
            C, CIN, KH, KW, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rstd = inverse_deviation(m2 * (1.0 / C), eps)[:, None]
        xhat = centred * rstd
        at = rows[:, None] * C + c[None, :]
        dout = tl.load(dout_ptr + at, mask=rows_ok[:, None] & c_ok[None, :], other=0.0).to(tl.float32)
        dg += tl.sum(dout * xhat, axis=0)
        dbeta += tl.sum(dout, axis=0)
        du = dout * g[None, :]
        total = tl.sum(du, axis=1) * (1.0 / C)
        along = tl.sum(du * xhat, axis=1) * (1.0 / C)
        du = tl.where(c_ok[None, :], (du - total[:, None] - xhat * along[:, None]) * rstd, 0.0)
        db += tl.sum(du, axis=0)
        du = du.to(dtype)
        ok = rows_ok[:, None] & d_ok[None, :]
        patch = tl.load(image_ptr + corner[:, None] + taps[None, :], mask=ok, other=0.0).to(dtype)
        dw = tl.dot(du.T, patch, dw, input_precision=PRECISION)
        if dimage_ptr is not None:
            w = tl.load(w_ptr + c[:, None] * DEPTH + d[None, :], mask=c_ok[:, None] & d_ok[None, :], other=0.0)
            grad = tl.dot(du, w.to(dtype), input_precision=PRECISION)
            at = stem_corners(rows, HO, WO, dstride_n, dstride_h, dstride_w, KH, KW)[:, None]
            at += stem_taps(d, dstride_i, dstride_h, dstride_w, KH, KW)[None, :]
            tl.store(dimage_ptr + at, grad.to(dimage_ptr.dtype.element_ty), mask=ok)
    sums_ptr += tl.program_id(0).to(tl.int64) * (C * DEPTH + 3 * C)
    tl.store(sums_ptr + c[:, None] * DEPTH + d[None, :], dw, mask=c_ok[:, None] & d_ok[None, :])
    if tl.program_id(1) == 0:
        tl.store(sums_ptr + C * DEPTH + c, db, mask=c_ok)
        tl.store(sums_ptr + C * DEPTH + C + c, dg, mask=c_ok)
        tl.store(sums_ptr + C * DEPTH + 2 * C + c, dbeta, mask=c_ok)


@triton.jit
def _stem_sum_kernel(
    sums_ptr, dw_ptr, db_ptr, dg_ptr, dbeta_ptr, SHARES, SIZE, C, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """sums: (SHARES, SIZE + 3·C), SIZE elements of dw. Grid (⌈(SIZE + 3·C)/BLOCK⌉,)."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = add_rows(sums_ptr, 0, SHARES, j, j < SIZE + 3 * C, SIZE + 3 * C, ROWS)
    tl.store(dw_ptr + j, total.to(dw_ptr.dtype.element_ty), mask=j < SIZE)
    if db_ptr is not None:
        tl.store(db_ptr + j - SIZE, total.to(db_ptr.dtype.element_ty), mask=(j >= SIZE) & (j < SIZE + C))
    ok = (j >= SIZE + C) & (j < SIZE + 2 * C)
    tl.store(dg_ptr + j - SIZE - C, total.to(dg_ptr.dtype.element_ty), mask=ok)
    ok = (j >= SIZE + 2 * C) & (j < SIZE + 3 * C)
    tl.store(dbeta_ptr + j - SIZE - 2 * C, total.to(dbeta_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _patch_gradient(
    dz_ptr, w_ptr, rows, rows_ok, c, tap, columns,
    C: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx̂ of the pixels ``tap`` of the patches ``rows``, at the channels ``c``. ``columns`` is N, see ``dot_tile``."""
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n0 in range(0, columns, BLOCK_K):
        n = n0 + tl.arange(0, BLOCK_K)
        dz = tl.load(dz_ptr + rows[:, None] * N + n[None, :], mask=rows_ok[:, None] & (n < N)[None, :], other=0.0)
        at = (n[:, None] * TAPS + tap) * C + c[None, :]
        w = tl.load(w_ptr + at, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
        dx = tl.dot(dz, w, dx, input_precision=PRECISION)
    return dx


@triton.jit(do_not_specialize=["P"])
def _downsample_input_kernel(
    dz_ptr, x_ptr, w_ptr, dx_ptr, xhat_ptr, P, H, W, HO, WO, columns, eps,
    C: tl.constexpr, N: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x, dx: (·, H, W, C); xhat: (KH·KW, P, C), of the pixels of x that patches cover. Grid (⌈P/BLOCK_M⌉, KH·KW).

    Beyond BLOCK_N channels dx̂ is computed twice, for the means and for dx, as it does not fit the registers.
    """
    TAPS: tl.constexpr = KH * KW
    tap = tl.program_id(1)
    patch = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # of 32 bits, for they are divided
    rows_ok = patch < P
    line = patch // WO
    pixel = (line // HO * H + line % HO * KH + tap // KW).to(tl.int64) * W + (patch % WO * KW + tap % KW)
    pixel *= C
    rows = patch.to(tl.int64)
    xhat_ptr += (tap.to(tl.int64) * P + rows[:, None]) * C
    mean, m2 = row_statistics(x_ptr + pixel, rows_ok, C, BLOCK_M, BLOCK_N)
    rstd = inverse_deviation(m2 * (1.0 / C), eps)
    total = tl.zeros((BLOCK_M,), tl.float32)
    along = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, C, BLOCK_N):
        c = first + tl.arange(0, BLOCK_N)
        at = pixel[:, None] + c[None, :]
        ok = rows_ok[:, None] & (c < C)[None, :]
        xhat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        tl.store(xhat_ptr + c[None, :], xhat.to(xhat_ptr.dtype.element_ty), mask=ok)
        dx = _patch_gradient(
            dz_ptr, w_ptr, rows, rows_ok, c, tap, columns, C, N, TAPS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        xhat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        total += tl.sum(dx, axis=1) * (1.0 / C)
        along += tl.sum(dx * xhat, axis=1) * (1.0 / C)
        if C <= BLOCK_N:
            dx = (dx - total[:, None] - xhat * along[:, None]) * rstd[:, None]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
    if C > BLOCK_N:
        for first in range(0, C, BLOCK_N):
            c = first + tl.arange(0, BLOCK_N)
            at = pixel[:, None] + c[None, :]
            ok = rows_ok[:, None] & (c < C)[None, :]
            dx = _patch_gradient(
                dz_ptr, w_ptr, rows, rows_ok, c, tap, columns, C, N, TAPS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
            xhat = (tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
            dx = (dx - total[:, None] - xhat * along[:, None]) * rstd[:, None]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["P", "share"])
def _downsample_weight_kernel(
    dz_ptr, xhat_ptr, w_ptr, D_ptr, dg_ptr, P, share,
    C: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of D by output channel, tap and channel, shares).

    xhat: (TAPS, P, C); D: (shares, N, TAPS, C); dg: (shares, ⌈N/BLOCK_M⌉·TAPS, C).
    """
    columns: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    tap = tile // columns % TAPS
    n = tile // columns // TAPS * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    xhat_ptr += tap.to(tl.int64) * P * C
    D = product_over_pixels(
        dz_ptr, xhat_ptr, None, split * share, share, P, n, c, C, N, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    ok = (n < N)[:, None] & (c < C)[None, :]
    tl.store(D_ptr + split * N * TAPS * C + (n[:, None] * TAPS + tap) * C + c[None, :], D, mask=ok)
    w = tl.load(w_ptr + (n[:, None] * C + c[None, :]) * TAPS + tap, mask=ok, other=0.0).to(tl.float32)
    groups: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M * TAPS
    tl.store(dg_ptr + (split * groups + tile // columns) * C + c, tl.sum(w * D, axis=0), mask=c < C)


@triton.jit
def _affine_gradients(
    db_sums_ptr, dg_sums_ptr, w_ptr, dg_ptr, dbeta_ptr, block, SHARES, GROUPS,
    C: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dg, of GROUPS sums, and dβ of the BLOCK_C channels number ``block``."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    dg = add_rows(dg_sums_ptr, 0, GROUPS, c, c_ok, C, 64)
    tl.store(dg_ptr + c, dg.to(dg_ptr.dtype.element_ty), mask=c_ok)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        db = add_rows(db_sums_ptr, 0, SHARES, n, n < N, N, 8)
        for tap in tl.static_range(TAPS):
            at = (n[:, None] * C + c[None, :]) * TAPS + tap
            w = tl.load(w_ptr + at, mask=(n < N)[:, None] & c_ok[None, :], other=0.0).to(tl.float32)
            total += w * db[:, None]
    tl.store(dbeta_ptr + c, tl.sum(total, axis=0).to(dbeta_ptr.dtype.element_ty), mask=c_ok)


@triton.jit
def _downsample_fold_kernel(
    D_ptr, db_sums_ptr, dg_sums_ptr, w_ptr, g_ptr, beta_ptr, dw_ptr, db_ptr, dg_ptr, dbeta_ptr,
    SHARES, DB_SHARES, GROUPS,
    C: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """Grid (SLICES + ⌈N/BLOCK_N⌉, ⌈C/BLOCK_C⌉): the first make dg (of GROUPS sums) and dβ of a slice of the channels
    each, for they walk all of w and of the sums, the others dw and db.
    """
    size = (tl.zeros((), tl.int64) + N) * TAPS * C
    if tl.program_id(0) < SLICES:
        _affine_gradients(
            db_sums_ptr, dg_sums_ptr, w_ptr, dg_ptr, dbeta_ptr, tl.program_id(1) * SLICES + tl.program_id(0),
            DB_SHARES, GROUPS, C, N, TAPS, 2 * BLOCK_N, BLOCK_C // SLICES,
        )  # fmt: skip
    else:
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        c_ok = c < C
        n = (tl.program_id(0) - SLICES) * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = (n < N)[:, None] & c_ok[None, :]
        g = tl.load(g_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
        db = add_rows(db_sums_ptr, 0, DB_SHARES, n, n < N, N, 8)
        if db_ptr is not None:  # noqa: SIM102 (decided at compile time)
            if tl.program_id(1) == 0:
                tl.store(db_ptr + n, db.to(db_ptr.dtype.element_ty), mask=n < N)
        for tap in range(TAPS):
            D = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            for s in range(SHARES):
                D += tl.load(D_ptr + s * size + (n[:, None] * TAPS + tap) * C + c[None, :], mask=ok, other=0.0)
            dw = tl.fma(D, g[None, :], db[:, None] * beta[None, :])
            at = (n[:, None] * C + c[None, :]) * TAPS + tap
            tl.store(dw_ptr + at, dw.to(dw_ptr.dtype.element_ty), mask=ok)


def _gradient_like(x: Tensor, covered: bool) -> Tensor:
    """An allocation for x's gradient; zeros unless the patches cover all of x."""
    return torch.empty_like(x) if covered else torch.zeros_like(x)


def stem_bwd(
    dout: Tensor,
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    needs_image: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor, Tensor]:
    """(dimage or None, dweight, dbias, dln_weight, dln_bias), each like its parameter, of ``stem_fwd``.

    dout (N, HO, WO, C) contiguous, of any float dtype; the rest as in ``stem_fwd``. Two launches.
    """
    C, CIN, KH, KW = weight.shape
    N, HO, WO, _ = dout.shape
    P, depth = N * HO * WO, CIN * KH * KW
    covered = image.shape[2] % KH == 0 and image.shape[3] % KW == 0
    dimage = _gradient_like(image, covered) if needs_image else None
    dw, db, dg, dbeta = (None if p is None else p.new_empty(p.shape) for p in (weight, bias, ln_weight, ln_bias))
    config, block, share = stem_bwd_config(P, C, depth, target_of(image))

    def run(part: Share) -> Tensor:
        patches = part.of(share, config.BLOCK_M)
        sums = image.new_empty((cdiv(P, patches), C * (depth + 3)), dtype=torch.float32)
        launch(
            _stem_bwd_kernel, (sums.shape[0], cdiv(depth, block)),
            image, weight, bias, ln_weight, dout, dimage, sums, P, patches, HO, WO,
            *image.stride(), *(image if dimage is None else dimage).stride(), eps,
            C=C, CIN=CIN, KH=KH, KW=KW, PRECISION=dot_precision(dtype), dtype=TL_DTYPES[dtype], BLOCK_D=block,
            **config.__dict__,
        )  # fmt: skip
        return sums

    sums = run(fastest(_stem_bwd_kernel, run, SHARES, dout, P, (C, CIN, KH, KW, dtype, image.dtype, needs_image)))
    launch(
        _stem_sum_kernel, (cdiv(C * (depth + 3), 64),),
        sums, dw, db, dg, dbeta, sums.shape[0], C * depth, C, ROWS=16, BLOCK=64, num_warps=4,
    )  # fmt: skip
    return dimage, dw, db, dg, dbeta


def downsample_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """(dx, dweight, dbias, dln_weight, dln_bias), each like its parameter, of ``downsample_fwd``.

    dout (N, HO, WO, C') contiguous, of any float dtype; x as in ``downsample_fwd``; weight (C', C, kh, kw) contiguous;
    ``dtype`` the compute dtype. Five launches.
    """
    B, H, W, C = x.shape
    N, _, KH, KW = weight.shape
    _, HO, WO, _ = dout.shape
    P, taps, target = B * HO * WO, KH * KW, target_of(x)
    wg, _ = fold_downsample(weight, bias, ln_weight, ln_bias, dtype)
    dx = _gradient_like(x, H % KH == 0 and W % KW == 0)
    dw, db, dg, dbeta = (None if p is None else p.new_empty(p.shape) for p in (weight, bias, ln_weight, ln_bias))

    shape = {"C": C, "N": N, "PRECISION": dot_precision(wg.dtype)}
    dz, db_sums = output_grad(dout.view(P, N), None, dtype, summed=True)
    xhat = x.new_empty((taps, P, C), dtype=dtype)
    config = downsample_input_config(C, dtype, target)
    launch(
        _downsample_input_kernel, (cdiv(P, config.BLOCK_M), taps),
        dz, x, wg, dx, xhat, P, H, W, HO, WO, N, eps, KH=KH, KW=KW, **shape, **config.__dict__,
    )  # fmt: skip
    config, share = downsample_weight_config(P, C, N, taps, dtype, target)
    rows = cdiv(N, config.BLOCK_M)

    def weights(part: Share) -> tuple[Tensor, Tensor]:
        patches = part.of(share, config.BLOCK_K)
        shares = cdiv(P, patches)
        D = x.new_empty((shares, N, taps, C), dtype=torch.float32)
        dg_sums = x.new_empty((shares, rows * taps, C), dtype=torch.float32)
        launch(
            _downsample_weight_kernel, (rows * taps * cdiv(C, config.BLOCK_N), shares),
            dz, xhat, weight, D, dg_sums, P, patches, TAPS=taps, **shape, **config.__dict__,
        )  # fmt: skip
        return D, dg_sums

    D, dg_sums = weights(fastest(_downsample_weight_kernel, weights, SHARES, wg, P, (C, N, KH, KW)))
    shares = D.shape[0]
    launch(
        _downsample_fold_kernel, (4 + cdiv(N, 32), cdiv(C, 64)),
        D, db_sums, dg_sums, weight, ln_weight, ln_bias, dw, db, dg, dbeta,
        shares, db_sums.shape[0], shares * rows * taps,
        C=C, N=N, TAPS=taps, BLOCK_N=32, BLOCK_C=64, SLICES=4, num_warps=4,
    )  # fmt: skip
    return dx, dw, db, dg, dbeta
