"""Depthwise k×k convolution (k = 3, 5, 7) on tensor cores: forward and data gradient, bf16 and fp16, NHWC.

    u[n, o, j, c] = b_c + Σ_{ky, kx} w[c, ky, kx] · x[n, o + ky − k//2, j + kx − k//2, c]

Cut the width into tiles of TW outputs, whose TW + k − 1 inputs are padded to 2·TW. For a channel c and a kernel row ky
the k taps form a band matrix

    T[c, ky] : (2·TW, TW)          T[i, j] = w[c, ky, i − j]   where 0 ≤ i − j < k, else 0

and 16 independent pairs (image, tile) form M. Then one loaded input row serves all the output rows it touches:

    A_h[c] : (16, 2·TW)            acc[o] += A_h[c] · T[c, h − o + k//2]        |h − o| ≤ k//2

k products per row, batched over channels. The k output rows in progress live in accumulators, row o always in the
same one, o mod k, so with the rows unrolled k times no register ever moves. The zeros of T multiply pixels that
belong to a neighbour in the tile: a NaN or inf in x therefore reaches every output of the tiles whose inputs hold it
(rows are exact), and nothing else.

The height may be cut into segments, each its own pair, when the batch alone does not fill the device; a segment reads
k − 1 rows that its neighbours read too.

The statistics of LayerNorm (see statistics.py) are those of the rounded u. A program owns one block of CB channels and
takes it DB channels at a time, which is what fits in registers; it merges the statistics of the sweeps.

The data gradient is the same sum with the taps flipped: dx = dy + Σ w[c, k−1−ky, k−1−kx] · du, ``residual`` being dy.
"""

# ruff: noqa: RUF005 (a Triton kernel grows a tuple by +, it has no starred expressions)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..autotuning import fastest
from ..dtypes import TL_DTYPES
from ..integers import cdiv
from ..launching import launch
from ..statistics import stats_block
from ..targets import target_of
from .tuning import TensorCoreConfig, segment_candidates, tensor_core_config


@triton.jit
def _band(w_ptr, c, c_ok, ky, TAPS: tl.constexpr, TW: tl.constexpr, FLIP: tl.constexpr, dtype: tl.constexpr):
    """T[c, ky] for a block of channels: (DB, 2·TW, TW)."""
    kx = tl.arange(0, 2 * TW)[None, :, None] - tl.arange(0, TW)[None, None, :]
    tap = ky * TAPS + kx
    if FLIP:
        tap = TAPS * TAPS - 1 - tap
    ok = (kx >= 0) & (kx < TAPS) & c_ok[:, None, None]
    return tl.load(w_ptr + c[:, None, None] * (TAPS * TAPS) + tap, mask=ok, other=0.0).to(dtype)


@triton.jit
def _load_row(x_ptr, x_off, x_ok, h, h_first, H, pitch, SPLIT: tl.constexpr, dtype: tl.constexpr):
    """Input row ``h`` of every pair's segment, (16, 2·TW, DB); zero outside the image."""
    row_ok = h_first + h < H
    if SPLIT:
        row_ok = row_ok & (h_first + h >= 0)
    return tl.load(x_ptr + (x_off + h * pitch), mask=x_ok & row_ok[:, None, None], other=0.0).to(dtype)


@triton.jit
def _accumulate(row, acc, band, start, s: tl.constexpr, TAPS: tl.constexpr):
    """Add an input row, the s-th modulo TAPS, to all open output rows: (the row it completes, the open rows)."""
    a = tl.permute(row, (2, 0, 1))
    rows = ()
    for t in tl.static_range(TAPS):
        new = tl.dot(a, band[TAPS - 1 - (t - s + TAPS) % TAPS], acc[t])
        if t == s:
            done = new
            rows = rows + (start,)
        else:
            rows = rows + (new,)
    return done, rows


@triton.jit
def _store_row(
    acc, u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, c_ok, known, count, o, o_first, SEGMENT, H, W, pitch,
    SPLIT: tl.constexpr, RESIDUAL: tl.constexpr, STATS: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Round and store output row ``o`` of every segment; merge its statistics with those of ``known`` channels."""
    row_ok = o_first + o >= o_first
    if SPLIT:
        row_ok = row_ok & (o_first + o < tl.minimum(o_first + SEGMENT, H))
    u_ok = u_ok & row_ok[:, None, None]
    s_ok = s_ok & row_ok[:, None]
    at = u_off + o * pitch
    u = tl.permute(acc, (1, 2, 0))
    if RESIDUAL:
        u += tl.load(r_ptr + at, mask=u_ok, other=0.0).to(tl.float32)
    u = u.to(u_ptr.dtype.element_ty)
    tl.store(u_ptr + at, u, mask=u_ok)
    if STATS:
        u = u.to(tl.float32)
        mean = tl.sum(u, 2) / tl.maximum(count, 1.0)
        centred = u - mean[:, :, None]
        if not EVEN_C:
            centred = tl.where(c_ok[None, None, :], centred, 0.0)
        m2 = tl.sum(centred * centred, 2)
        at = (s_off + o * W)[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        s_ok = s_ok[:, :, None]
        known_mean, known_m2 = tl.split(
            tl.load(stats_ptr + at, mask=s_ok & (tl.zeros((1, 1, 1), tl.float32) < known), other=0.0)
        )
        share = count / (known + count)
        delta = mean - known_mean
        mean = known_mean + delta * share
        m2 += known_m2 + delta * delta * (known * share)
        tl.store(stats_ptr + at, tl.join(mean, m2), mask=s_ok)


@triton.jit(do_not_specialize=["C_VEC"])
def dwconv_tensor_core_kernel(
    x_ptr, w_ptr, b_ptr, r_ptr, u_ptr, stats_ptr, N, H, W, C_VEC, WT, SEGMENT, SEGMENTS, GROUPS,
    TAPS: tl.constexpr, VEC: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr, TW: tl.constexpr, TAIL: tl.constexpr,
    SPLIT: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STATS: tl.constexpr,
    EVEN_C: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """x, r, u: (N, H, W, C); w: (C, TAPS, TAPS); b: (C,); stats: (⌈C/CB⌉, N·H·W, 2).

    Grid (⌈C/CB⌉ · ⌈pairs/16⌉,), channel blocks fastest; pairs = N · SEGMENTS · WT, WT = ⌈W/TW⌉. A segment has
    GROUPS·TAPS + TAIL input rows: H of them when it is the whole height, else SEGMENT + TAPS − 1. C = VEC·C_VEC, which
    tells the compiler how far accesses may be vectors. WIDE: offsets within 16 pairs pass 2^31, so they are int64.
    """
    HALF: tl.constexpr = TAPS // 2
    C = C_VEC * VEC
    # Input row h completes output row h − LAG. Whole images start at input row 0, segments HALF rows above their first
    # output, so that output o uses accumulator (o + LAG) % TAPS in both.
    LAG: tl.constexpr = 2 * HALF if SPLIT else HALF
    NB = tl.cdiv(C, CB)
    block = tl.program_id(0) % NB
    pair_first = tl.program_id(0) // NB * 16
    pair = pair_first + tl.arange(0, 16)
    n_first = pair_first // (WT * SEGMENTS)
    n = pair // (WT * SEGMENTS)
    tile = pair % WT
    if SPLIT:
        o_first = pair // WT % SEGMENTS * SEGMENT
        h_first = o_first - HALF
    else:
        o_first = tl.zeros((16,), tl.int32)
        h_first = o_first

    pixels = tl.zeros((), tl.int64) + n_first
    pixels = pixels * H * W
    x_ptr += pixels * C
    u_ptr += pixels * C
    r_ptr += pixels * C
    stats_ptr += ((tl.zeros((), tl.int64) + block) * N * H * W + pixels) * 2
    row_in = (n - n_first) * H + h_first
    row_out = (n - n_first) * H + o_first
    pitch = W * C
    if WIDE:
        row_in = (pair - pair + n - n_first).to(tl.int64) * H + h_first
        row_out = row_in - h_first + o_first
        pitch = (tl.zeros((), tl.int64) + W) * C
    i = tl.arange(0, 2 * TW)
    iw = tile[:, None] * TW + i[None, :] - HALF
    # Pixels that only zeros of T multiply are not read, so that their NaNs do not spread further than necessary.
    in_ok = (n[:, None] < N) & (iw >= 0) & (iw < W) & (i[None, :] < TW + TAPS - 1)
    ow = tile[:, None] * TW + tl.arange(0, TW)[None, :]
    s_ok = (n[:, None] < N) & (ow < W)
    s_off = row_out[:, None] * W + ow

    for before in range(0, CB, DB):
        c = block * CB + before + tl.arange(0, DB)
        c_ok = c < C
        band = ()
        for ky in tl.static_range(TAPS):
            band = band + (_band(w_ptr, c, c_ok, ky, TAPS, TW, FLIP, dtype),)
        start = tl.zeros((DB, 16, TW), tl.float32)
        if BIAS:
            start += tl.load(b_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[:, None, None]
        x_off = (row_in[:, None] * W + iw)[:, :, None] * C + c[None, None, :]
        u_off = s_off[:, :, None] * C + c[None, None, :]
        x_ok = in_ok[:, :, None]
        u_ok = s_ok[:, :, None]
        if EVEN_C:
            x_ok = x_ok & (c >= 0)[None, None, :]
        else:
            x_ok = x_ok & c_ok[None, None, :]
            u_ok = u_ok & c_ok[None, None, :]
        # Sizes of the sets of channels to merge: those of earlier sweeps, and this one's, which may lie beyond C.
        known = (tl.zeros((), tl.int32) + before).to(tl.float32)
        count = tl.maximum(tl.minimum(C - block * CB - before, DB), 0).to(tl.float32)

        acc = ()
        for _ in tl.static_range(TAPS):
            acc = acc + (start,)
        row = _load_row(x_ptr, x_off, x_ok, 0, h_first, H, pitch, SPLIT, dtype)
        for g in range(GROUPS):
            for s in tl.static_range(TAPS):
                ahead = _load_row(x_ptr, x_off, x_ok, g * TAPS + s + 1, h_first, H, pitch, SPLIT, dtype)
                done, acc = _accumulate(row, acc, band, start, s, TAPS)
                row = ahead
                if s >= LAG:
                    _store_row(
                        done, u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, c_ok, known, count,
                        g * TAPS + s - LAG, o_first, SEGMENT, H, W, pitch, SPLIT, RESIDUAL, STATS, EVEN_C,
                    )  # fmt: skip
                else:
                    if g > 0:
                        _store_row(
                            done, u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, c_ok, known, count,
                            g * TAPS + s - LAG, o_first, SEGMENT, H, W, pitch, SPLIT, RESIDUAL, STATS, EVEN_C,
                        )  # fmt: skip
        for s in tl.static_range(TAIL):
            ahead = _load_row(x_ptr, x_off, x_ok, GROUPS * TAPS + s + 1, h_first, H, pitch, SPLIT, dtype)
            done, acc = _accumulate(row, acc, band, start, s, TAPS)
            row = ahead
            _store_row(
                done, u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, c_ok, known, count,
                GROUPS * TAPS + s - LAG, o_first, SEGMENT, H, W, pitch, SPLIT, RESIDUAL, STATS, EVEN_C,
            )  # fmt: skip
        if not SPLIT:
            for s in tl.static_range(HALF):
                _store_row(
                    acc[(TAIL + s) % TAPS], u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, c_ok, known, count,
                    H - HALF + s, o_first, SEGMENT, H, W, pitch, SPLIT, RESIDUAL, STATS, EVEN_C,
                )  # fmt: skip
        if STATS:
            tl.debug_barrier()  # the next sweep reads the statistics that this one wrote


def dwconv_tensor_core(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    flip: bool,
    statistics: bool,
    config: TensorCoreConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Depthwise convolution of ``x`` (N, H, W, C) with products in ``dtype`` (float16 or bfloat16), float32 sums.

    ``weight`` (C, 1, k, k) and ``bias`` (C,) are of any float dtype, ``residual`` (N, H, W, C) or None is added.
    Returns the sum in ``out_dtype`` and, with ``statistics``, its float32 partial statistics (⌈C/CB⌉, N·H·W, 2).
    ``config`` replaces the configuration of tuning.py.
    """
    batch, height, width, channels = x.shape
    taps = weight.shape[-1]
    block = stats_block(channels, dtype)
    default = tensor_core_config(tuple(x.shape), taps, block, target_of(x))
    candidates = (config,) if config else segment_candidates(default, height)
    u = x.new_empty(x.shape, dtype=out_dtype)
    blocks = cdiv(channels, block)
    stats = None
    if statistics:
        stats = x.new_empty((blocks, batch * height * width, 2), dtype=torch.float32)
    if x.numel() == 0:
        return u, stats
    vec = math.gcd(channels, 16)

    def run(config: TensorCoreConfig) -> None:
        tiles = cdiv(width, config.tile_width)
        split = config.segment < height
        segments = cdiv(height, config.segment)
        rows = config.segment + taps - 1 if split else height
        images = 16 // (tiles * segments) + 2
        launch(
            dwconv_tensor_core_kernel,
            (blocks * cdiv(batch * segments * tiles, 16),),
            x, weight, weight if bias is None else bias, x if residual is None else residual, u,
            u if stats is None else stats,
            batch, height, width, channels // vec, tiles, config.segment, segments, rows // taps,
            TAPS=taps, VEC=vec, CB=block, DB=config.dot_channels, TW=config.tile_width, TAIL=rows % taps, SPLIT=split,
            FLIP=flip, BIAS=bias is not None, RESIDUAL=residual is not None, STATS=statistics,
            EVEN_C=channels % block == 0, WIDE=images * height * width * channels >= 2**31, dtype=TL_DTYPES[dtype],
            num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip

    residual_dtype = None if residual is None else residual.dtype
    given = channels, height, width, taps, x.dtype, out_dtype, flip, statistics, bias is None, residual_dtype
    run(fastest(dwconv_tensor_core_kernel, run, candidates, x, batch, given))
    return u, stats
