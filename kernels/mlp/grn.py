"""The global response norm of ConvNeXt V2, between the activation and fc2, in the MLP's own kernels.

Of a sample and a hidden unit k, with sums over the sample's pixels p and means over all K hidden units:

    G_k = (Σ_p h²)^½      N_k = G_k / (mean G + ε)      f_k = 1 + weight_k·N_k      GRN(h) = f_k·h + bias_k

A first pass over the pixels leaves partial sums of h² in float32: fc1, which writes h as well in the wide form
(``gemm.py``). The narrow form (``fused.py``) recomputes h in a second pass instead of writing it, 6 units of P·C
elements to and from memory instead of 13 for a block with its convolution. The second pass takes f from the sums
itself, on the way to its product. A row tile never holds pixels of two samples, so that a sum belongs to one sample,
and the sums of a sample's tiles are added in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..folding import add_rows
from ..integers import cdiv
from ..launching import launch

EPS = tl.constexpr(1e-6)
MOST_TILES = 4


class Grn(NamedTuple):
    """The parameters of the norm, weight (K,) and bias (K,) or None for none, and the number of samples."""

    weight: Tensor
    bias: Tensor | None
    samples: int


class Scaling(NamedTuple):
    """What the second product makes GRN from: sums (N, tiles, K) of h², few tiles; weight and bias as in `Grn`."""

    sums: Tensor
    weight: Tensor
    bias: Tensor | None


class Factors(NamedTuple):
    """What the backward needs of GRN: values (N, 2, K), f and the factor of h in dh; the bias (K,) or None."""

    values: Tensor
    bias: Tensor | None


def row_tiles(P: int, samples: int | None, block: int) -> int:
    """Tiles of ``block`` rows that cover P rows: each of its ``samples`` alone, or all together for None."""
    return cdiv(P, block) if samples is None else samples * cdiv(P // max(samples, 1), block)


@triton.jit
def count_row_tiles(P, rows_per_sample, BY_SAMPLE: tl.constexpr, BLOCK_M: tl.constexpr):
    """``row_tiles`` in a kernel."""
    if BY_SAMPLE:
        return P // rows_per_sample * tl.cdiv(rows_per_sample, BLOCK_M)
    else:
        return tl.cdiv(P, BLOCK_M)


@triton.jit
def rows_of_tile(first, rows, P, rows_per_sample, BY_SAMPLE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(first row, which of the ``rows`` after it exist, sample) of the tile number ``first`` / BLOCK_M.

    BY_SAMPLE: every sample begins a tile. Without it the sample is 0.
    """
    if BY_SAMPLE:
        tile = (first // BLOCK_M).to(tl.int32)
        tiles = tl.cdiv(rows_per_sample, BLOCK_M)
        start = tile % tiles * BLOCK_M
        first = (tile // tiles).to(tl.int64) * rows_per_sample + start
        rows_ok = (start + rows < rows_per_sample) & (first + rows < P)
        return first, rows_ok, tl.minimum(tile // tiles, P // rows_per_sample - 1).to(tl.int64)
    else:
        return first, first + rows < P, tl.zeros((), tl.int64)


@triton.jit
def sum_of_tiles(sums_ptr, k, K, TILES: tl.constexpr, STRIDE: tl.constexpr):
    """The sums of a sample's tiles, which lie STRIDE apart, at the hidden units ``k``."""
    total = tl.load(sums_ptr + k, mask=k < K, other=0.0)
    for tile in tl.static_range(1, TILES):
        total += tl.load(sums_ptr + tile * STRIDE + k, mask=k < K, other=0.0)
    return total


@triton.jit
def inverse_mean(sums_ptr, K: tl.constexpr, TILES: tl.constexpr):
    """1 / (mean G + ε) of the sample whose sums begin at ``sums_ptr``."""
    BLOCK: tl.constexpr = 1024 if K > 512 else triton.next_power_of_2(K)  # min gives no constexpr in Triton 3.5
    total = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, K, BLOCK):
        total += tl.sqrt(sum_of_tiles(sums_ptr, k0 + tl.arange(0, BLOCK), K, TILES, K))
    return 1.0 / (tl.sum(total, axis=0) * (1.0 / K) + EPS)


@triton.jit
def factor_at(sums_ptr, weight_ptr, inverse, k, K: tl.constexpr, TILES: tl.constexpr):
    """f at the hidden units ``k``; ``inverse`` is ``inverse_mean``."""
    weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return tl.fma(weight * inverse, tl.sqrt(sum_of_tiles(sums_ptr, k, K, TILES, K)), 1.0)


@triton.jit
def bias_at(bias_ptr, k, K: tl.constexpr):
    """The bias at the hidden units ``k``, zero where ``bias_ptr`` is None."""
    if bias_ptr is None:
        return tl.zeros(k.shape, tl.float32)
    else:
        return tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def factors_at(factors_ptr, sample, k, K: tl.constexpr):
    """(f, the factor of h in dh) of a sample at the hidden units ``k``; factors: (N, 2, K)."""
    at = factors_ptr + sample * (2 * K) + k
    return tl.load(at, mask=k < K, other=0.0), tl.load(at + K, mask=k < K, other=0.0)


@triton.jit
def _add_tiles_kernel(sums_ptr, total_ptr, tiles, WIDTH, BLOCK: tl.constexpr):
    """Grid (N, ⌈WIDTH/BLOCK⌉): total (N, WIDTH) of sums (N, tiles, WIDTH)."""
    sample = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = add_rows(sums_ptr, sample * tiles, sample * tiles + tiles, k, k < WIDTH, WIDTH, 8)
    tl.store(total_ptr + sample * WIDTH + k, total, mask=k < WIDTH)


def few_tiles(sums: Tensor) -> Tensor:
    """``sums`` (N, tiles, …) as they are, or added up to one tile a sample where there are more than ``MOST_TILES``."""
    samples, tiles, *rest = sums.shape
    if tiles <= MOST_TILES:
        return sums
    total = sums.new_empty((samples, 1, *rest))
    width = sums.stride(1)
    launch(_add_tiles_kernel, (samples, cdiv(width, 64)), sums, total, tiles, width, BLOCK=64, num_warps=2)
    return total
