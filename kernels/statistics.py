"""LayerNorm's statistics as the convolution writes them: one (mean, M2) pair per pixel and channel block.

    mean_b = Σ_{c in block} u_c / n_b        M2_b = Σ_{c in block} (u_c − mean_b)²

A block holds CB channels, the last may be short. Merging (Chan, Golub and LeVeque 1979) never subtracts squares, so a
large common offset of u loses no digits:

    n = n_a + n_b    δ = mean_b − mean_a    mean = mean_a + δ·n_b/n    M2 = M2_a + M2_b + δ²·n_a·n_b/n

Layout: float32 of shape (NB, P, 2), P pixels, NB = ⌈C / CB⌉, last axis (mean, M2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .integers import cdiv, remembered

_BLOCKS = {torch.float32: (64, 32, 16), torch.float16: (32, 16), torch.bfloat16: (32, 16)}


@remembered
def stats_block(channels: int, dtype: torch.dtype) -> int:
    """Channels per block of statistics, which is the channel block CB of the convolution that emits them.

    The largest size that pads ``channels`` by at most an eighth, else the size that pads least. ``dtype`` is the
    compute dtype (float32, float16 or bfloat16). ``CB`` elements of u have 8 bytes of statistics.
    """
    sizes = _BLOCKS[dtype]
    padded = [cdiv(channels, size) * size for size in sizes]
    for size, total in zip(sizes, padded, strict=True):
        if 8 * total <= 9 * channels:
            return size
    return sizes[padded.index(min(padded))]


@triton.jit
def inverse_deviation(variance, eps):
    """(variance + eps)^-½ in float32, whatever the type of eps: Inductor passes Python floats to kernels as float64."""
    return tl.rsqrt(variance + tl.cast(eps, tl.float32))


@triton.jit
def _merge_block(stats_ptr, rows, rows_ok, P, C, b, mean, m2, CB: tl.constexpr):
    """Merge channel block ``b`` into the mean and M2 of the blocks before it."""
    first = tl.zeros((), tl.int64) + b * CB
    last = tl.minimum(first + CB, C)
    pair = tl.arange(0, 2)
    at = (tl.zeros((), tl.int64) + b) * P * 2 + rows * 2
    block_mean, block_m2 = tl.split(tl.load(stats_ptr + at[:, None] + pair[None, :], mask=rows_ok[:, None], other=0.0))
    delta = block_mean - mean
    share = (last - first).to(tl.float32) / last.to(tl.float32)
    return mean + delta * share, m2 + block_m2 + delta * delta * (first.to(tl.float32) * share)


@triton.jit
def merge_statistics(stats_ptr, rows, rows_ok, P, C, eps, CB: tl.constexpr, NB: tl.constexpr):
    """(mean, rstd), float32 vectors, of the pixels ``rows`` (a 1-D block of indices, any value where not ``rows_ok``).

    C is the number of channels, CB those of a block, NB = ⌈C / CB⌉. Rows that are not ok give mean 0, rstd eps^-½.
    """
    rows = rows.to(tl.int64)
    if NB <= 32:
        b = tl.arange(0, triton.next_power_of_2(NB))[None, :]
        at = stats_ptr + rows[:, None] * 2 + b.to(tl.int64) * P * 2
        ok = rows_ok[:, None] & (b < NB)
        block_mean = tl.load(at, mask=ok, other=0.0)
        block_m2 = tl.load(at + 1, mask=ok, other=0.0)
        count = tl.maximum(tl.minimum(C - b * CB, CB), 0).to(tl.float32)
        mean = tl.sum(block_mean * count, axis=1) / C
        delta = block_mean - mean[:, None]
        m2 = tl.sum(tl.fma(delta * delta, count, block_m2), axis=1)
    else:
        mean = tl.zeros(rows.shape, tl.float32)
        m2 = tl.zeros(rows.shape, tl.float32)
        for b in range(NB):
            mean, m2 = _merge_block(stats_ptr, rows, rows_ok, P, C, b, mean, m2, CB)
    return mean, inverse_deviation(m2 / C, eps)
