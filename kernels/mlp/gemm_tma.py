"""The two GEMMs of wide blocks in persistent kernels that TMA feeds, on sm_90 and sm_100: ``CONVNEXT_FAST_TMA=1``.

The formulas are those of gemm.py. As many programs as there are processors take tiles in turn. The tensor memory
accelerator copies boxes of both operands to shared memory, with zeros outside of the matrices. One warp requests the
boxes, also those of the next tile, while two groups of warps multiply and finish a tile (``warp_specialize``).

A kernel makes its descriptors itself, in memory that Triton asks `launching` for. So its parameters are
addresses, like those of any kernel, and a replay passes the addresses of its own tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..environment import switch
from ..gelu import gelu_form
from ..integers import cdiv
from ..launching import is_traced, launch, with_scratch_memory
from ..statistics import inverse_deviation
from ..targets import PROCESSORS, target_of
from .gemm import end_hidden, end_result, tile_of_program
from .grn import Grn
from .tuning import TmaConfig, is_known, norm_blocks, tma_config

ENABLED = switch("CONVNEXT_FAST_TMA")


@triton.jit
def _pair(bits):
    """(mean, M2), two float32 numbers, of their 64 bits."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True), (bits >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _merge_statistics(stats_ptr, rows, rows_ok, P, eps, C: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr):
    """``statistics.merge_statistics`` without a reduction or a loop, which cannot be divided among groups of warps."""
    at = stats_ptr.to(tl.pointer_type(tl.int64)) + rows
    mean, m2 = _pair(tl.load(at, mask=rows_ok, other=0))
    for b in tl.static_range(1, NB):
        at += P
        block_mean, block_m2 = _pair(tl.load(at, mask=rows_ok, other=0))
        delta = block_mean - mean
        mean += delta * (min(CB, C - b * CB) / min(C, b * CB + CB))
        m2 += block_m2 + delta * delta * (min(CB, C - b * CB) / min(C, b * CB + CB) * (b * CB))
    return mean, inverse_deviation(m2 / C, eps)


@triton.jit
def _dot_boxes(left, right, m, n, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The product of the rows from ``m`` and the rows from ``n`` on of two matrices, given by their descriptors."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        total = tl.dot(left.load([m, k]), right.load([n, k]).T, total)
    return total


@triton.jit(do_not_specialize=["P"])
def _fc1_tma_kernel(
    u_ptr, stats_ptr, w1_ptr, b1_ptr, h_ptr, a_ptr, P, depth, eps,
    C: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    u = tl.make_tensor_descriptor(u_ptr, [P, C], [C, 1], [BLOCK_M, BLOCK_K])
    w1 = tl.make_tensor_descriptor(w1_ptr, [K, C], [C, 1], [BLOCK_N, BLOCK_K])
    tiles = tl.cdiv(P, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles * tl.cdiv(K, BLOCK_N), PROGRAMS, warp_specialize=True):
        tile_m, tile_n = tile_of_program(tile, tiles, K, BLOCK_N, 8)
        first = tile_m.to(tl.int64) * BLOCK_M
        rows_ok = first + rows < P
        mean, rstd = None, None
        if NB > 0:
            mean, rstd = _merge_statistics(stats_ptr, first + rows, rows_ok, P, eps, C, CB, NB)
        a = _dot_boxes(u, w1, tile_m * BLOCK_M, tile_n * BLOCK_N, depth, BLOCK_M, BLOCK_N, BLOCK_K)
        part_a = None
        if a_ptr is not None:
            part_a = a_ptr + first * K
        end_hidden(
            a, b1_ptr, mean, rstd, part_a, h_ptr + first * K, None, rows, rows_ok, tile_n * BLOCK_N,
            K, ACT, FORM, BLOCK_M, BLOCK_N, HALVES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P", "rows_per_sample"])
def _fc2_tma_kernel(
    h_ptr, w2_ptr, residual_ptr, b2_ptr, gamma_ptr, drop_scale_ptr, y_ptr, copy_ptr, P, rows_per_sample, depth,
    C: tl.constexpr, K: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    h = tl.make_tensor_descriptor(h_ptr, [P, K], [K, 1], [BLOCK_M, BLOCK_K])
    w2 = tl.make_tensor_descriptor(w2_ptr, [C, K], [K, 1], [BLOCK_N, BLOCK_K])
    tiles = tl.cdiv(P, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles * tl.cdiv(C, BLOCK_N), PROGRAMS, warp_specialize=True):
        tile_m, tile_n = tile_of_program(tile, tiles, C, BLOCK_N, 8)
        first = tile_m.to(tl.int64) * BLOCK_M
        rows_ok = first + rows < P
        z = _dot_boxes(h, w2, tile_m * BLOCK_M, tile_n * BLOCK_N, depth, BLOCK_M, BLOCK_N, BLOCK_K)
        end_result(
            z, residual_ptr, b2_ptr, gamma_ptr, drop_scale_ptr, y_ptr, copy_ptr, tile_n * BLOCK_N, first, rows, rows_ok,
            rows_per_sample, C, BLOCK_M, BLOCK_N, HALVES,
        )  # fmt: skip


def serves(u: Tensor, stats: Tensor | None, w1g: Tensor, w2: Tensor, grn: Grn | None) -> bool:
    """Whether ``tma_mlp_fwd`` is requested and supports these operands.

    It needs 16 bits, strides and addresses that TMA accepts, and enough tiles for all processors.
    """
    if not ENABLED or not is_known(u.shape[0]) or grn is not None or u.dtype == torch.float32:
        return False
    if tma_config(target_of(u), True, False) is None:
        return False
    given = (u, w1g, w2) if stats is None else (u, w1g, w2, stats)
    if any(width % 8 for width in w1g.shape) or any(_address(tensor) % 16 for tensor in given):
        return False
    return _tiles(u.shape[0], u.shape[1], 128, 128) >= PROCESSORS[target_of(u)]


def _address(tensor: Tensor) -> int:
    """The address of the first element; for a compiler's tensor, the one within its storage, which is aligned."""
    return tensor.storage_offset() * tensor.element_size() if is_traced(tensor) else tensor.data_ptr()


def _tiles(rows: int, columns: int, block_rows: int, block_columns: int) -> int:
    return cdiv(rows, block_rows) * cdiv(columns, block_columns)


def tma_mlp_fwd(
    u, stats, residual, w1g, b1g, w2, b2, gamma, drop_scale, eps, act, save_hidden, grn=None, out=None
) -> tuple[Tensor, Tensor | None]:
    """``mlp_fwd`` with the same arguments, if ``serves`` says so."""
    (P, C), K = u.shape, w1g.shape[0]
    h = u.new_empty((P, K))
    a = h.new_empty((P, K)) if save_hidden else None
    y, copy = out or ((u if residual is None else residual).new_empty((P, C)), None)
    CB, NB = norm_blocks(stats, C, u.dtype)
    target = target_of(u)
    programs = PROCESSORS[target]

    def run(kernel: Any, columns: int, config: TmaConfig, *args: Any, **meta: Any) -> None:
        grid = min(programs, _tiles(P, columns, config.BLOCK_M, config.BLOCK_N))
        meta |= config.__dict__
        with_scratch_memory(launch, kernel, (grid,), *args, C=C, K=K, PROGRAMS=programs, **meta)

    run(
        _fc1_tma_kernel, K, tma_config(target, True, save_hidden), u, stats, w1g, b1g, h, a, P, C, eps,
        CB=CB, NB=NB, ACT=act, FORM=gelu_form(u.dtype),
    )  # fmt: skip
    heavy = y.dtype == torch.float32 or _tiles(P, C, 256, 128) < programs
    per_sample = P // (1 if drop_scale is None else max(drop_scale.numel(), 1))
    run(
        _fc2_tma_kernel, C, tma_config(target, False, heavy),
        h, w2, residual, b2, gamma, drop_scale, y, copy, P, per_sample, K,
    )  # fmt: skip
    return y, a
