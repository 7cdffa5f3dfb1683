"""Weight and bias gradient of the depthwise k×k convolution (k = 3, 5, 7), NHWC, deterministic.

    dw[c, ky, kx] = Σ_p x[p + (ky, kx) − k//2, c] · du[p, c]            db_c = Σ_p du[p, c]

Tensor-core form (float16, bfloat16). With the tiles, the pairs and the padding of tensor_core.py, but the 16
pairs along K, the gradient of the band matrix is

    dT[c, ky] += A_h[c]ᵀ · dU_{h + k//2 − ky}[c]        (2·TW, 16) · (16, TW)      k products per input row h

where a ring holds the k rows of du that an input row meets, row o in slot o mod k. The weights are its diagonals,
dw[c, ky, kx] = Σ_j dT[c, ky][j + kx, j]. The last padding row of A is set to 1, so the last row of dT[c, k//2] sums du.

Scalar form (float32). A program owns one kernel row ky: TW gradients and TW + k − 1 pixels of a row sit in registers
and give k·TW multiply-adds; nothing is rounded to TF32.

gluon_wgrad.py has the first form with explicit layouts, for NVIDIA.

All write one partial sum per program, (splits, k, 8, C) float32 with kx in 0 … k − 1 and the bias at [k//2, 7], and a
second launch adds them in a fixed order, without atomics, so two runs give the same bits.
"""

# ruff: noqa: RUF005 (a Triton kernel grows a tuple by +, it has no starred expressions)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..autotuning import SHARES, Share, fastest
from ..dtypes import TL_DTYPES
from ..integers import cdiv
from ..launching import launch
from ..targets import target_of
from .gluon_wgrad import SLOTS, dwconv_wgrad_gluon, supports_wgrad
from .tuning import WgradConfig, wgrad_config


@triton.jit
def _load_rows(ptr, off, ok, h, H, pitch, other, dtype: tl.constexpr):
    """Row ``h`` of every pair; ``other`` outside the image."""
    row_ok = tl.zeros((1, 1, 1), tl.int32) + h
    ok = ok & (row_ok >= 0) & (row_ok < H)
    return tl.load(ptr + (off + h * pitch), mask=ok, other=other).to(dtype)


@triton.jit
def _correlate(row, ring, acc, s: tl.constexpr, TAPS: tl.constexpr):
    """Add input row h ≡ s (mod TAPS) times the TAPS rows of du in the ring to dT[0 … TAPS − 1]."""
    a = tl.permute(row, (2, 1, 0))
    new = ()
    for ky in tl.static_range(TAPS):
        new = new + (tl.dot(a, tl.permute(ring[(s + TAPS // 2 - ky + TAPS) % TAPS], (2, 0, 1)), acc[ky]),)
    return new


@triton.jit
def _replace(ring, row, slot: tl.constexpr, TAPS: tl.constexpr):
    """The ring with ``row`` in ``slot``."""
    new = ()
    for t in tl.static_range(TAPS):
        if t == slot:
            new = new + (row,)
        else:
            new = new + (ring[t],)
    return new


@triton.jit
def dwconv_wgrad_tensor_core_kernel(
    x_ptr, du_ptr, partial_ptr, N, H, W, C_VEC, WT, PAIRS, SPLIT_PAIRS, GROUPS,
    TAPS: tl.constexpr, VEC: tl.constexpr, DB: tl.constexpr, TW: tl.constexpr, TAIL: tl.constexpr, EVEN_C: tl.constexpr,
    WIDE: tl.constexpr, SLOTS: tl.constexpr, AHEAD: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """x, du: (N, H, W, C); partial: (splits, TAPS, SLOTS, C) float32.

    Grid (⌈C/DB⌉ · splits,), channel blocks fastest; a program takes SPLIT_PAIRS pairs (image, tile), 16 at a time.
    H = GROUPS·TAPS + TAIL. C = VEC·C_VEC, which tells the compiler how far loads may be vectors. WIDE: offsets within
    16 pairs pass 2^31, so they are int64.
    """
    HALF: tl.constexpr = TAPS // 2
    C = C_VEC * VEC
    NB = tl.cdiv(C, DB)
    c = tl.program_id(0) % NB * DB + tl.arange(0, DB)
    c_ok = c < C
    split = tl.program_id(0) // NB
    i = tl.arange(0, 2 * TW)
    j = tl.arange(0, TW)
    ones = (i == 2 * TW - 1).to(x_ptr.dtype.element_ty)[None, :, None]
    pitch = W * C
    if WIDE:
        pitch = (tl.zeros((), tl.int64) + W) * C
    acc = ()
    for _ in tl.static_range(TAPS):
        acc = acc + (tl.zeros((DB, 2 * TW, TW), tl.float32),)

    inverse_tiles = 1.0 / WT
    for pair_first in range(split * SPLIT_PAIRS, tl.minimum((split + 1) * SPLIT_PAIRS, PAIRS), 16):
        n_first = pair_first // WT
        pair = pair_first - n_first * WT + tl.arange(0, 16)
        # pair // WT, exact below 2^20: a product is a tenth of an integer division's instructions.
        image = ((pair.to(tl.float32) + 0.5) * inverse_tiles).to(tl.int32)
        tile = pair - image * WT
        n = n_first + image
        origin = (tl.zeros((), tl.int64) + n_first) * H * W * C
        row_off = image * H
        if WIDE:
            row_off = image.to(tl.int64) * H
        iw = tile[:, None] * TW + i[None, :] - HALF
        x_ok = ((n[:, None] < N) & (iw >= 0) & (iw < W) & (i[None, :] < TW + TAPS - 1))[:, :, None]
        x_off = (row_off[:, None] * W + iw)[:, :, None] * C + c[None, None, :]
        ow = tile[:, None] * TW + j[None, :]
        du_ok = ((n[:, None] < N) & (ow < W))[:, :, None]
        du_off = (row_off[:, None] * W + ow)[:, :, None] * C + c[None, None, :]
        if EVEN_C:
            x_ok = x_ok & (c >= 0)[None, None, :]
            du_ok = du_ok & (c >= 0)[None, None, :]
        else:
            x_ok = x_ok & c_ok[None, None, :]
            du_ok = du_ok & c_ok[None, None, :]
        ring = ()
        for t in tl.static_range(TAPS):
            if t < HALF:
                ring = ring + (_load_rows(du_ptr + origin, du_off, du_ok, t, H, pitch, 0.0, dtype),)
            else:
                ring = ring + (tl.zeros((16, TW, DB), dtype),)
        # With AHEAD a row is loaded while the one before it is multiplied.
        if AHEAD:
            du = _load_rows(du_ptr + origin, du_off, du_ok, HALF, H, pitch, 0.0, dtype)
            row = _load_rows(x_ptr + origin, x_off, x_ok, 0, H, pitch, ones, dtype)
        for g in range(GROUPS):
            for s in tl.static_range(TAPS):
                h = g * TAPS + s + AHEAD
                next_du = _load_rows(du_ptr + origin, du_off, du_ok, h + HALF, H, pitch, 0.0, dtype)
                next_row = _load_rows(x_ptr + origin, x_off, x_ok, h, H, pitch, ones, dtype)
                if not AHEAD:
                    du, row = next_du, next_row
                ring = _replace(ring, du, (s + HALF) % TAPS, TAPS)
                acc = _correlate(row, ring, acc, s, TAPS)
                du, row = next_du, next_row
        for s in tl.static_range(TAIL):
            h = GROUPS * TAPS + s + AHEAD
            next_du = _load_rows(du_ptr + origin, du_off, du_ok, h + HALF, H, pitch, 0.0, dtype)
            next_row = _load_rows(x_ptr + origin, x_off, x_ok, h, H, pitch, ones, dtype)
            if not AHEAD:
                du, row = next_du, next_row
            ring = _replace(ring, du, (s + HALF) % TAPS, TAPS)
            acc = _correlate(row, ring, acc, s, TAPS)
            du, row = next_du, next_row

    kx = tl.arange(0, SLOTS)
    diagonal = tl.broadcast_to(((kx[:, None] + j[None, :]) % TW)[None, :, :], (DB, SLOTS, TW))
    partial_ptr += (tl.zeros((), tl.int64) + split) * TAPS * SLOTS * C
    for ky in tl.static_range(TAPS):
        # Of rows i and i + TW one is on a diagonal that is a tap, so half the matrix holds them all.
        upper, lower = tl.split(tl.permute(tl.reshape(acc[ky], (DB, 2, TW, TW)), (0, 2, 3, 1)))
        taps = tl.sum(tl.gather(tl.where(j[:, None] >= j[None, :], upper, lower), diagonal, 1), 2)
        if ky == HALF:
            bias = tl.sum(tl.sum(tl.where(j[:, None] == TW - 1, lower, 0.0), 2), 1)
            taps = tl.where(kx[None, :] == SLOTS - 1, bias[:, None], taps)
        at = (ky * SLOTS + kx)[None, :] * C + c[:, None]
        tl.store(partial_ptr + at, taps, mask=c_ok[:, None] & (kx >= 0)[None, :])


@triton.jit(do_not_specialize=["C_VEC"])
def dwconv_wgrad_scalar_kernel(
    x_ptr, du_ptr, partial_ptr, ROWS, H, W, C_VEC, WT, SPLIT_ROWS,
    TAPS: tl.constexpr, VEC: tl.constexpr, CB: tl.constexpr, BR: tl.constexpr, TW: tl.constexpr, EVEN_C: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """x, du: (N, H, W, C), ROWS = N·H; partial: (splits, TAPS, SLOTS, C) float32.

    Grid (⌈C/CB⌉ · TAPS · splits,), channel blocks fastest, then ky; a program takes SPLIT_ROWS rows, BR at a time.
    C = VEC·C_VEC as above.
    """
    HALF: tl.constexpr = TAPS // 2
    C = C_VEC * VEC
    NB = tl.cdiv(C, CB)
    c = tl.program_id(0) % NB * CB + tl.arange(0, CB)
    c_ok = c < C
    ky = tl.program_id(0) // NB % TAPS
    split = tl.program_id(0) // (NB * TAPS)
    pitch = (tl.zeros((), tl.int64) + W) * C
    acc = ()
    for _ in tl.static_range(TAPS + 1):
        acc = acc + (tl.zeros((BR, CB), tl.float32),)
    for row_first in range(split * SPLIT_ROWS, tl.minimum((split + 1) * SPLIT_ROWS, ROWS), BR):
        row = row_first + tl.arange(0, BR)
        o = row % H
        row_ok = row < ROWS
        x_row_ok = row_ok & (o + (ky - HALF) >= 0) & (o + (ky - HALF) < H)
        if EVEN_C:
            du_ok = row_ok[:, None] & (c >= 0)[None, :]
            x_ok = x_row_ok[:, None] & (c >= 0)[None, :]
        else:
            du_ok = row_ok[:, None] & c_ok[None, :]
            x_ok = x_row_ok[:, None] & c_ok[None, :]
        off = row.to(tl.int64)[:, None] * pitch + c[None, :]
        x_row = x_ptr + (ky - HALF) * pitch + off
        for tile in range(WT):
            j_first = tile * TW
            du = ()
            for j in tl.static_range(TW):
                ok = du_ok & (row + (j_first + j) < row + W)[:, None]
                du = du + (tl.load(du_ptr + off + (j_first + j) * C, mask=ok, other=0.0).to(tl.float32),)
            for i in tl.static_range(TW + TAPS - 1):
                if (j_first + (i - HALF) >= 0) & (j_first + (i - HALF) < W):
                    pixel = tl.load(x_row + (j_first + (i - HALF)) * C, mask=x_ok, other=0.0).to(tl.float32)
                    new = ()
                    for kx in tl.static_range(TAPS):
                        if i - kx >= 0 and i - kx < TW:
                            new = new + (tl.fma(pixel, du[i - kx], acc[kx]),)
                        else:
                            new = new + (acc[kx],)
                    acc = new + (acc[TAPS],)
            bias = acc[TAPS]
            for j in tl.static_range(TW):
                bias += du[j]
            new = ()
            for kx in tl.static_range(TAPS):
                new = new + (acc[kx],)
            acc = new + (bias,)
    partial_ptr += ((tl.zeros((), tl.int64) + split) * TAPS + ky) * SLOTS * C
    for kx in tl.static_range(TAPS):
        tl.store(partial_ptr + kx * C + c, tl.sum(acc[kx], 0), mask=c_ok)
    tl.store(partial_ptr + (SLOTS - 1) * C + c, tl.sum(acc[TAPS], 0), mask=c_ok)


@triton.jit
def add_taps(
    partial_ptr, dw_ptr, db_ptr, c, slot, C, SPLITS,
    TAPS: tl.constexpr, SLOTS: tl.constexpr, CB: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Add up slot ``slot`` of TAPS · SLOTS of partial (SPLITS, TAPS, SLOTS, C), at the CB channels ``c``.

    dw: (C, TAPS, TAPS); db: (C,) or None.
    """
    ky = slot // SLOTS
    kx = slot % SLOTS
    is_tap = tl.zeros((CB,), tl.int32) + kx < TAPS
    is_bias = tl.zeros((CB,), tl.int32) + slot == TAPS // 2 * SLOTS + SLOTS - 1
    ok = (c < C) & (is_tap | is_bias)
    total = tl.zeros((BS, CB), tl.float32)
    for first in range(0, SPLITS, BS):
        split = first + tl.arange(0, BS)
        at = (split.to(tl.int64) * (TAPS * SLOTS) + slot)[:, None] * C + c[None, :]
        total += tl.load(partial_ptr + at, mask=(split < SPLITS)[:, None] & ok[None, :], other=0.0)
    out = tl.sum(total, 0)
    tl.store(dw_ptr + c * (TAPS * TAPS) + ky * TAPS + kx, out.to(dw_ptr.dtype.element_ty), mask=ok & is_tap)
    if db_ptr is not None:
        tl.store(db_ptr + c, out.to(db_ptr.dtype.element_ty), mask=ok & is_bias)


@triton.jit
def dwconv_wgrad_sum_kernel(
    partial_ptr, dw_ptr, db_ptr, C, SPLITS, TAPS: tl.constexpr, SLOTS: tl.constexpr, CB: tl.constexpr, BS: tl.constexpr
):
    """Grid (⌈C/CB⌉, TAPS · SLOTS)."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    add_taps(partial_ptr, dw_ptr, db_ptr, c, tl.program_id(1), C, SPLITS, TAPS, SLOTS, CB, BS)


def dwconv_wgrad_partials(
    x: torch.Tensor, du: torch.Tensor, taps: int, config: WgradConfig | None = None
) -> torch.Tensor:
    """Partial sums of the gradients, (splits, k, SLOTS, C) float32 with k = ``taps``, for ``add_taps``.

    ``x`` (N, H, W, C) is of any float dtype, ``du`` (N, H, W, C) of the compute dtype. In float16 and bfloat16, x is
    rounded to it and tensor cores multiply, on NVIDIA in gluon_wgrad.py where supported; float32 does neither.
    ``config`` replaces the configuration of tuning.py for the forms of this file.
    """
    if config is None and supports_wgrad(x, du):
        return dwconv_wgrad_gluon(x, du, taps)
    batch, height, width, channels = x.shape
    candidates = SHARES[:1] if config else SHARES
    config = config or wgrad_config(tuple(x.shape), du.dtype, target_of(x), x.element_size() == 4)
    tiles = cdiv(width, config.tile_width)
    blocks = cdiv(channels, config.block_channels)
    even = channels % config.block_channels == 0

    exact = du.dtype == torch.float32
    items = batch * height if exact else batch * tiles

    def run(share: Share) -> torch.Tensor:
        split = share.of(config.split, config.block_rows if exact else 16)
        splits = cdiv(items, split)
        partial = x.new_empty((splits, taps, SLOTS, channels), dtype=torch.float32)
        if exact:
            vec = math.gcd(channels, 16)
            launch(
                dwconv_wgrad_scalar_kernel, (blocks * taps * splits,),
                x, du, partial, items, height, width, channels // vec, tiles, split,
                TAPS=taps, VEC=vec, CB=config.block_channels, BR=config.block_rows, TW=config.tile_width, EVEN_C=even,
                SLOTS=SLOTS, num_warps=config.num_warps, num_stages=1,
            )  # fmt: skip
        else:
            images, vec = 16 // tiles + 2, math.gcd(channels, 8)
            launch(
                dwconv_wgrad_tensor_core_kernel, (blocks * splits,),
                x, du, partial, batch, height, width, channels // vec, tiles, items, split, height // taps,
                TAPS=taps, VEC=vec, DB=config.block_channels, TW=config.tile_width, TAIL=height % taps, EVEN_C=even,
                WIDE=images * height * width * channels >= 2**31, SLOTS=SLOTS, AHEAD=config.ahead,
                dtype=TL_DTYPES[du.dtype],
                num_warps=config.num_warps, num_stages=1,
            )  # fmt: skip
        return partial

    kernel = dwconv_wgrad_scalar_kernel if exact else dwconv_wgrad_tensor_core_kernel
    return run(fastest(kernel, run, candidates, x, batch, (channels, height, width, taps, du.dtype)))


def dwconv_wgrad(
    x: torch.Tensor, du: torch.Tensor, taps: int, config: WgradConfig | None = None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dweight (C, 1, k, k), dbias (C,)) in ``dtype``, of a depthwise convolution with k = ``taps``.

    The other arguments as in ``dwconv_wgrad_partials``.
    """
    return add_partials(dwconv_wgrad_partials(x, du, taps, config), dtype)


def add_partials(partial: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(dweight (C, 1, k, k), dbias (C,)) in ``dtype``, from the partial sums of ``dwconv_wgrad_partials``."""
    splits, taps, _, channels = partial.shape
    dw = partial.new_empty((channels, 1, taps, taps), dtype=dtype)
    db = partial.new_empty((channels,), dtype=dtype)
    launch(
        dwconv_wgrad_sum_kernel, (cdiv(channels, 32), taps * SLOTS),
        partial, dw, db, channels, splits, TAPS=taps, SLOTS=SLOTS, CB=32, BS=4, num_warps=1,
    )  # fmt: skip
    return dw, db
