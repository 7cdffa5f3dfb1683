"""Depthwise k×k convolution (k = 3, 5, 7) with float32 multiply-adds: forward and data gradient of float32, NHWC.

    u[n, o, j, c] = b_c + Σ_{ky, kx} w[c, ky, kx] · x[n, o + ky − k//2, j + kx − k//2, c]

No product is rounded to TF32. A thread owns a few channels of TW neighbouring outputs of one row, in registers, and
walks the TW + k − 1 pixels of an input row once: a loaded pixel serves up to k outputs. The rows above and below are
read again, from the cache, by the programs of the neighbouring output rows.

The statistics of LayerNorm (see statistics.py) are those of u as stored. The data gradient is the same sum with the
taps flipped: dx = dy + Σ w[c, k−1−ky, k−1−kx] · du, ``residual`` being dy.
"""

# ruff: noqa: RUF005 (a Triton kernel grows a tuple by +, it has no starred expressions)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..autotuning import fastest
from ..integers import cdiv
from ..launching import launch
from ..statistics import stats_block
from ..targets import target_of
from .tuning import ScalarConfig, scalar_candidates, scalar_config


@triton.jit
def _spread(pixel, taps, acc, i: tl.constexpr, TAPS: tl.constexpr, TW: tl.constexpr):
    """Add the i-th pixel of a tile's inputs to the outputs it touches."""
    new = ()
    for j in tl.static_range(TW):
        if i - j >= 0 and i - j < TAPS:
            new = new + (tl.fma(pixel, taps[i - j], acc[j]),)
        else:
            new = new + (acc[j],)
    return new


@triton.jit(do_not_specialize=["C_VEC"])
def dwconv_scalar_kernel(
    x_ptr, w_ptr, b_ptr, r_ptr, u_ptr, stats_ptr, ROWS, H, W, C_VEC, WT,
    TAPS: tl.constexpr, VEC: tl.constexpr, CB: tl.constexpr, BR: tl.constexpr, TW: tl.constexpr,
    FLIP: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STATS: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """x, r, u: (N, H, W, C), ROWS = N·H; w: (C, TAPS, TAPS); b: (C,); stats: (⌈C/CB⌉, N·H·W, 2).

    Grid (⌈C/CB⌉ · WT · ⌈ROWS/BR⌉,), channel blocks fastest, then the WT = ⌈W/TW⌉ tiles; a program has BR rows.
    C = VEC·C_VEC, which tells the compiler how far accesses may be vectors.
    """
    HALF: tl.constexpr = TAPS // 2
    C = C_VEC * VEC
    NB = tl.cdiv(C, CB)
    block = tl.program_id(0) % NB
    c = block * CB + tl.arange(0, CB)
    c_ok = c < C
    j_first = tl.program_id(0) // NB % WT * TW
    row_first = tl.program_id(0) // (NB * WT) * BR
    row = row_first + tl.arange(0, BR)
    o = row % H
    pitch = (tl.zeros((), tl.int64) + W) * C
    origin = (tl.zeros((), tl.int64) + row_first) * pitch
    out_off = ((row - row_first) * pitch + j_first * C)[:, None] + c[None, :]
    x_ptr += origin
    u_ptr += origin
    r_ptr += origin
    bias = tl.zeros((1, CB), tl.float32)
    if BIAS:
        bias += tl.load(b_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    acc = ()
    for _ in tl.static_range(TW):
        acc = acc + (tl.zeros((BR, CB), tl.float32) + bias,)

    for ky in range(TAPS):
        row_ok = (row < ROWS) & (o + (ky - HALF) >= 0) & (o + (ky - HALF) < H)
        x_row = x_ptr + (ky - HALF) * pitch + out_off
        taps = ()
        for kx in tl.static_range(TAPS):
            tap = ky * TAPS + kx
            if FLIP:
                tap = TAPS * TAPS - 1 - tap
            taps = taps + (tl.load(w_ptr + c * (TAPS * TAPS) + tap, mask=c_ok, other=0.0).to(tl.float32)[None, :],)
        ok = row_ok[:, None]
        if EVEN_C:
            ok = ok & (c >= 0)[None, :]
        else:
            ok = ok & c_ok[None, :]
        for i in tl.static_range(TW + TAPS - 1):
            if (j_first + (i - HALF) >= 0) & (j_first + (i - HALF) < W):
                pixel = tl.load(x_row + (i - HALF) * C, mask=ok, other=0.0).to(tl.float32)
                acc = _spread(pixel, taps, acc, i, TAPS, TW)

    count = tl.minimum(C - block * CB, CB).to(tl.float32)
    stats_ptr += ((tl.zeros((), tl.int64) + block) * ROWS + row_first) * W * 2
    stats_off = ((row - row_first).to(tl.int64) * W + j_first) * 2
    for j in tl.static_range(TW):
        row_ok = (row < ROWS) & (row + (j_first + j) < row + W)
        ok = row_ok[:, None]
        if EVEN_C:
            ok = ok & (c >= 0)[None, :]
        else:
            ok = ok & c_ok[None, :]
        u = acc[j]
        if RESIDUAL:
            u += tl.load(r_ptr + out_off + j * C, mask=ok, other=0.0).to(tl.float32)
        u = u.to(u_ptr.dtype.element_ty)
        tl.store(u_ptr + out_off + j * C, u, mask=ok)
        if STATS:
            u = u.to(tl.float32)
            mean = tl.sum(u, 1) / count
            centred = u - mean[:, None]
            if not EVEN_C:
                centred = tl.where(c_ok[None, :], centred, 0.0)
            m2 = tl.sum(centred * centred, 1)
            at = (stats_off + 2 * j)[:, None] + tl.arange(0, 2)[None, :]
            tl.store(stats_ptr + at, tl.join(mean, m2), mask=row_ok[:, None])


def dwconv_scalar(
    x, weight, bias, residual, *, out_dtype, flip, statistics, config=None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``dwconv_tensor_core`` in float32, whatever the dtypes of its arguments; the statistics' blocks are those of
    ``stats_block(C, float32)``.
    """
    batch, height, width, channels = x.shape
    block = stats_block(channels, torch.float32)
    candidates = (config,) if config else scalar_candidates(scalar_config(tuple(x.shape), block, target_of(x)))
    u = x.new_empty(x.shape, dtype=out_dtype)
    blocks = cdiv(channels, block)
    stats = None
    if statistics:
        stats = x.new_empty((blocks, batch * height * width, 2), dtype=torch.float32)
    if x.numel() == 0:
        return u, stats
    vec, taps = math.gcd(channels, 16), weight.shape[-1]

    def run(config: ScalarConfig) -> None:
        tiles = cdiv(width, config.tile_width)
        launch(
            dwconv_scalar_kernel,
            (blocks * tiles * cdiv(batch * height, config.block_rows),),
            x, weight, weight if bias is None else bias, x if residual is None else residual, u,
            u if stats is None else stats,
            batch * height, height, width, channels // vec, tiles,
            TAPS=taps, VEC=vec, CB=block, BR=config.block_rows, TW=config.tile_width, FLIP=flip,
            BIAS=bias is not None, RESIDUAL=residual is not None, STATS=statistics, EVEN_C=channels % block == 0,
            num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip

    residual_dtype = None if residual is None else residual.dtype
    given = channels, height, width, taps, out_dtype, flip, statistics, bias is None, residual_dtype
    run(fastest(dwconv_scalar_kernel, run, candidates, x, batch, given))
    return u, stats
