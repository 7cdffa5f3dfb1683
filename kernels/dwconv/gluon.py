"""The depthwise convolution of tensor_core.py with explicit layouts, for NVIDIA: fewer instructions per output.

The formula, tiles, pairs, segments, band matrices T and spread of NaNs are as in tensor_core.py. What differs is
how the rows are fed. A warp owns 4 channels. cp.async copies rows of x to shared memory, STAGES − 1 rows early. Their
order there lets every thread read its fragments of the matrix product, 4 channels at a time, without bank conflicts;
registers are renamed, never shuffled. Rows of a residual come likewise, each thread's own. A finished row goes through
shared memory once: it leaves in whole sectors, and each thread then holds it as an operand, from which the matrix unit
makes the statistics.

Needs C to be a multiple of 8, x aligned to 16 bytes, and the Gluon of Triton 3.6 or later (``AVAILABLE``).
"""

# ruff: noqa: RUF005 (a kernel grows a tuple by +, it has no starred expressions)
from __future__ import annotations

import functools
import os

import torch

from ..autotuning import fastest
from ..integers import cdiv
from ..launching import is_traced, launch
from ..statistics import stats_block
from ..targets import target_of
from .tuning import GluonConfig, gluon_config, residual_early, segment_candidates

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

    # It has another name before Triton 3.7.
    async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
    AVAILABLE = os.environ.get("TRITON_INTERPRET") != "1"
except ImportError:
    AVAILABLE = False

if AVAILABLE:

    @gluon.jit
    def _row_here(h):
        """``h``, in a way that keeps the compiler from computing the addresses of later rows early, in registers.

        It is the first lane's, all having the same, and an exchange between lanes stays where it stands.
        """
        return gl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [h], dtype=gl.int32, is_pure=False, pack=1
        )

    @gluon.jit
    def _fetch(row, x_ptr, x_off, step, x_ok, h, h_first, h_end, pitch, C: gl.constexpr):
        """Start the copy of input row ``h`` of the segment for every pair; zeros outside the image and from ``h_end``.

        A quarter of a row is the pixels with k = 0, 2, 4, 6; the others are those of k + 1, 8, 9, constants away.
        """
        inside = (h_first + h >= 0) & (h_first + h < h_end)
        row_ptr = x_ptr + h * pitch
        for i in gl.static_range(4):
            async_load(row.slice(64 * i, 64), row_ptr + x_off + step + (i % 2 + i // 2 * 8) * C, mask=x_ok[i] & inside)
        async_copy.commit_group()

    @gluon.jit
    def _fetch_residual(slot, r_ptr, u_off, shift, u_ok, o, o_end, pitch):
        """Start each thread's copy of what it will add to output row ``o``; the next commit counts it in."""
        async_load(slot, r_ptr + o * pitch + u_off + shift, mask=u_ok & ((o >= 0) & (o < o_end)))

    @gluon.jit
    def _operands(row, WIDE_ROW: gl.constexpr, WARPS: gl.constexpr, A: gl.constexpr, dtype: gl.constexpr):
        """A row as read from shared memory -> four (WARPS, 16, 16) operands, one a channel; nothing moves."""
        if WIDE_ROW:  # float32: bits of a row index are k3 k0 p3 p2 p1 k2 k1 p0
            bits = gl.permute(gl.reshape(row, [2, 2, 2, 2, 2, 2, 2, 2, WARPS, 4]), [8, 2, 3, 4, 7, 0, 5, 6, 1, 9])
        else:  # k3 k0 p3 p2 k2 k1 p1 p0
            bits = gl.permute(gl.reshape(row, [2, 2, 2, 2, 2, 2, 2, 2, WARPS, 4]), [8, 2, 3, 6, 7, 0, 4, 5, 1, 9])
        even, odd = gl.split(gl.reshape(bits, [WARPS, 16, 16, 2, 2]))
        c0, c2 = gl.split(even)
        c1, c3 = gl.split(odd)
        return (
            gl.convert_layout(c0.to(dtype), A, assert_trivial=True),
            gl.convert_layout(c1.to(dtype), A, assert_trivial=True),
            gl.convert_layout(c2.to(dtype), A, assert_trivial=True),
            gl.convert_layout(c3.to(dtype), A, assert_trivial=True),
        )

    @gluon.jit
    def _accumulate(a, acc, band, zero, s: gl.constexpr, TAPS: gl.constexpr):
        """Add an input row, the s-th modulo TAPS, to all open output rows: (the row it completes, the open rows)."""
        done = ()
        rows = ()
        for i in gl.static_range(4 * TAPS):
            new = mma_v2(a[i // TAPS], band[i // TAPS * TAPS + TAPS - 1 - (i % TAPS - s + TAPS) % TAPS], acc[i])
            if i % TAPS == s:
                done = done + (new,)
                rows = rows + (zero,)
            else:
                rows = rows + (new,)
        return done, rows

    @gluon.jit
    def _store_statistics(u, stats_ptr, at, held, row_off, ok, share, WARPS: gl.constexpr):
        """(mean, M2) of each pixel of u (16, 2, 2, 2, 4·WARPS) to the pair ``row_off + at + held``; ``share`` is
        1/channels.

        Σu and Σu² are products of the matrix unit with ones and with uᵀ (the diagonal), for a thread holds u as an
        operand already, up to the order of the channels, which does not matter for a sum. M2 = Σu² − (Σu)²/n then errs
        by about 2^-23 of the squared mean. Rounding u has moved M2 by more wherever |mean| is below some hundreds of
        standard deviations (float16; thousands in bfloat16), and beyond that it has left u next to no digits.
        """
        CB: gl.constexpr = WARPS * 4
        MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
        A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
        B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
        bits = gl.reshape(u, [WARPS, 16 // WARPS, 2, 8 // WARPS, WARPS // 2, 4, CB // 8, 2])  # pair, pair, j, j, j, c
        tiles = gl.reshape(gl.permute(bits, [3, 0, 2, 1, 4, 6, 5, 7]), [8, 16, CB])
        a = gl.convert_layout(tiles, A, assert_trivial=True)
        ones = gl.full([8, CB, 8], 1.0, u.dtype, layout=B)
        half = mma_v2(a, ones, gl.full([8, 16, 8], 0.0, gl.float32, layout=MMA))
        twice = gl.reshape(gl.permute(gl.join(half, half), [0, 1, 3, 2]), [8, 16, 16])
        total = gl.convert_layout(twice, MMA, assert_trivial=True)
        transposed = gl.convert_layout(gl.permute(tiles, [0, 2, 1]), B, assert_trivial=True)
        square = mma_v2(a, transposed, gl.full([8, 16, 16], 0.0, gl.float32, layout=MMA))
        total_even, total_odd = gl.split(gl.reshape(total, [8, 16, 8, 2]))
        square_even, square_odd = gl.split(gl.reshape(square, [8, 16, 8, 2]))
        HALVES: gl.constexpr = total_even.type.layout
        row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, HALVES)))[None, :, None]
        column = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, HALVES)))[None, None, :]
        mean = gl.where(row % 2 == 0, total_even, total_odd) * share
        m2 = gl.maximum(gl.where(row % 2 == 0, square_even, square_odd) - mean * mean / share, 0.0)
        to = stats_ptr + _as_rows(at, HALVES, WARPS)[:, :, None] * 2 + column * 0 + row_off * 2
        to += _as_rows(held, HALVES, WARPS)[:, :, None] * 2
        ok = _as_rows(ok, HALVES, WARPS)[:, :, None] & (row // 2 == column)
        gl.store(to, mean, mask=ok)
        gl.store(to + 1, m2, mask=ok)

    @gluon.jit
    def _as_rows(pixels, HALVES: gl.constexpr, WARPS: gl.constexpr):
        """Values of pixels (16, 2, 2, 2) -> (8, 16), the rows of _store_statistics."""
        bits = gl.reshape(pixels, [WARPS, 16 // WARPS, 2, 8 // WARPS, WARPS // 2])
        rows = gl.reshape(gl.permute(bits, [3, 0, 2, 1, 4]), [8, 16])
        return gl.convert_layout(rows, gl.SliceLayout(2, HALVES), assert_trivial=True)

    @gluon.jit
    def _store_row(
        done, slot, place, o, C: gl.constexpr, WARPS: gl.constexpr, STORE: gl.constexpr, BIAS: gl.constexpr,
        RESIDUAL: gl.constexpr, EARLY: gl.constexpr, STATS: gl.constexpr, dtype: gl.constexpr,
    ):  # fmt: skip
        """Round four channels' (WARPS, 16, 8) sums, bring them to (16, 2, 2, 2, 4·WARPS), pair, j and c, and store."""
        u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, held, share, W, pitch, bias = place
        if BIAS:
            done = (done[0] + bias[0], done[1] + bias[1], done[2] + bias[2], done[3] + bias[3])
        quads = gl.join(gl.join(done[0].to(dtype), done[2].to(dtype)), gl.join(done[1].to(dtype), done[3].to(dtype)))
        rows = gl.permute(gl.reshape(quads, [WARPS, 16, 8, 4]), [1, 2, 0, 3])
        u = gl.convert_layout(gl.reshape(rows, [16, 2, 2, 2, WARPS * 4]), STORE)
        shift = (held * C)[:, :, :, :, None]
        to = u_ptr + u_off + o * pitch + shift  # in this order: the rows after the loop use its first sum, too
        if RESIDUAL:
            if EARLY:
                residual = slot.load(STORE)
            else:
                residual = gl.load(r_ptr + u_off + o * pitch + shift, mask=u_ok, other=0.0)
            gl.store(to, (u.to(gl.float32) + residual.to(gl.float32)).to(u_ptr.dtype.element_ty), mask=u_ok)
        else:
            gl.store(to, u.to(u_ptr.dtype.element_ty), mask=u_ok)
        if STATS:
            _store_statistics(u, stats_ptr, s_off, held, o * W, s_ok, share, WARPS)

    @gluon.jit(do_not_specialize=("N", "H", "W", "WT", "SEGMENT", "SEGMENTS", "GROUPS"))
    def dwconv_gluon_kernel(
        x_ptr, w_ptr, b_ptr, r_ptr, u_ptr, stats_ptr, N, H, W, WT, SEGMENT, SEGMENTS, GROUPS,
        C: gl.constexpr, TAPS: gl.constexpr, WARPS: gl.constexpr, TAIL: gl.constexpr, SPLIT: gl.constexpr,
        FLIP: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, STATS: gl.constexpr, STAGES: gl.constexpr,
        WIDE_ROW: gl.constexpr, WIDE: gl.constexpr, COPY: gl.constexpr, SHARED: gl.constexpr, READ: gl.constexpr,
        STORE: gl.constexpr, PIECE: gl.constexpr, ENDS: gl.constexpr, EARLY: gl.constexpr, dtype: gl.constexpr,
    ):  # fmt: skip
        """As dwconv_tensor_core_kernel, with CB = 4·WARPS; WIDE_ROW: x is float32; EARLY: the residual comes with x.

        GROUPS is at least 1.
        """
        HALF: gl.constexpr = TAPS // 2
        LAG: gl.constexpr = 2 * HALF if SPLIT else HALF
        CB: gl.constexpr = WARPS * 4
        MMA: gl.constexpr = gl.NVMMADistributedLayout(
            version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
        )
        A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
        B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
        NB: gl.constexpr = (C + CB - 1) // CB
        block = gl.program_id(0) % NB
        c_first = block * CB
        o_first = gl.program_id(0) // NB % SEGMENTS * SEGMENT
        o_end = gl.minimum(SEGMENT, H - o_first)
        h_first = o_first - (LAG - HALF)
        h_end = gl.minimum(o_first + SEGMENT + HALF, H)
        pair_first = gl.program_id(0) // (NB * SEGMENTS) * 16
        n_first = pair_first // WT
        zero64 = gl.to_tensor(0).to(gl.int64)
        pitch = W * C
        if WIDE:
            pitch = (zero64 + W) * C
        pixels = ((zero64 + n_first) * H + o_first) * W
        x_ptr += (pixels - (LAG - HALF) * W) * C
        u_ptr += pixels * C
        r_ptr += pixels * C
        stats_ptr += ((zero64 + block) * N * H * W + pixels) * 2

        r = gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
        step = r * 0
        if WIDE_ROW:  # a thread copies the pixels of k and k + 4
            p = (r & 1) | (((r >> 3) & 7) << 1)
            k = r & 2
            step = r & 4
        else:
            p = (r & 3) | (((r >> 4) & 3) << 2)
            k = ((r >> 2) & 3) << 1
        pair = pair_first + p
        n = pair // WT
        c = c_first + gl.arange(0, CB, layout=gl.SliceLayout(0, COPY))
        x_ok = ()
        for i in gl.static_range(4):
            ki = k + step + (i % 2 + i // 2 * 8)
            iw = pair % WT * 8 + ki - HALF
            x_ok = x_ok + (((n < N) & (iw >= 0) & (iw < W) & (ki < 8 + TAPS - 1))[:, None] & (c < C)[None, :],)
        image = (n - n_first) * H
        if WIDE:
            image = (n - n_first).to(gl.int64) * H
        x_off = ((image * W + pair % WT * 8 + k - HALF) * C)[:, None] + c[None, :]
        step = (step * C)[:, None]
        rows = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, 256, CB], SHARED)
        ends = rows
        if EARLY:
            ends = gl.allocate_shared_memory(r_ptr.dtype.element_ty, [STAGES, 16, 2, 2, 2, CB], ENDS)
        for d in gl.static_range(STAGES - 1):
            _fetch(rows.index(d), x_ptr, x_off, step, x_ok, d, h_first, h_end, pitch, C)

        bw = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, B)))[:, None, None]
        bk = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, B)))[None, :, None]
        bj = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, B)))[None, None, :]
        tap_ok = (bk - bj >= 0) & (bk - bj < TAPS)
        first_tap = (c_first + bw * 4) * (TAPS * TAPS) + bk - bj
        if FLIP:
            first_tap = (c_first + bw * 4) * (TAPS * TAPS) + (TAPS * TAPS - 1) - (bk - bj)
        band = ()
        for i in gl.static_range(4 * TAPS):
            if FLIP:
                at = first_tap + (i // TAPS * TAPS - i % TAPS) * TAPS
            else:
                at = first_tap + (i // TAPS * TAPS + i % TAPS) * TAPS
            ok = tap_ok
            if C % CB != 0:
                ok = tap_ok & (c_first + bw * 4 + i // TAPS < C)
            tap = gl.load(w_ptr + at, mask=ok, other=0.0)
            band = band + (tap.to(dtype),)
        zero = gl.full([WARPS, 16, 8], 0.0, gl.float32, layout=MMA)
        bias = ()
        if BIAS:
            at = c_first + gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None] * 4
            for i in gl.static_range(4):
                bias = bias + (gl.load(b_ptr + at + i, mask=at + i < C, other=0.0).to(gl.float32),)
        acc = ()
        for _ in gl.static_range(4 * TAPS):
            acc = acc + (zero,)

        # A thread's pixels are j + 4 (and j + 2) apart: what is held in registers is a constant to add to one address.
        PIXELS: gl.constexpr = gl.SliceLayout(4, STORE)
        J0: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PIXELS)))
        J1: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, PIXELS)))
        J2: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, PIXELS)))
        PAIR: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PIXELS)))
        o_pair = pair_first + gl.arange(0, 16, layout=PAIR)[:, None, None, None]
        j0 = gl.arange(0, 2, layout=J0)[None, None, None, :]
        j1 = gl.arange(0, 2, layout=J1)[None, None, :, None] * 2
        held = gl.arange(0, 2, layout=J2)[None, :, None, None] * 4 + (j1 + j0 + o_pair) * 0
        if PIECE == 4:
            held += j1
            j1 *= 0
        o_n = o_pair // WT
        o_w = o_pair % WT * 8 + j1 + j0
        CHANNEL: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, STORE))))
        o_c = c_first + gl.arange(0, CB, layout=CHANNEL)
        o_image = (o_n - n_first) * H
        if WIDE:
            o_image = (o_n - n_first).to(gl.int64) * H
        s_off = o_image * W + o_w + held * 0
        s_ok = (o_n < N) & (o_w + held < W)
        u_off = (s_off * C)[:, :, :, :, None] + o_c[None, None, None, None, :]
        u_ok = s_ok[:, :, :, :, None] & (o_c < C)[None, None, None, None, :]
        shift = (held * C)[:, :, :, :, None]
        if EARLY:
            for d in gl.static_range(LAG, STAGES - 1):
                _fetch_residual(ends.index(d), r_ptr, u_off, shift, u_ok, d - LAG, o_end, pitch)
            if LAG < STAGES - 1:  # the rows' copies were committed before: no later wait for a row covers these
                async_copy.commit_group()
                async_copy.wait_group(0)
        share = 1.0 / CB
        if C % CB != 0:
            share = 1.0 / gl.minimum(C - c_first, CB).to(gl.float32)

        place = u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, held, share, W, pitch, bias
        gl.assume(GROUPS >= 1)  # so that the rows after the loop use the addresses that the loop has in registers
        for g in range(GROUPS):
            for s in gl.static_range(TAPS):
                h = g * TAPS + s
                async_copy.wait_group(STAGES - 2)
                a = _operands(rows.index(h % STAGES).load(READ), WIDE_ROW, WARPS, A, dtype)
                done, acc = _accumulate(a, acc, band, zero, s, TAPS)
                o = _row_here(h) - LAG
                ahead = rows.index((h + STAGES - 1) % STAGES)
                if EARLY:
                    end = ends.index((h + STAGES - 1) % STAGES)
                    _fetch_residual(end, r_ptr, u_off, shift, u_ok, o + (STAGES - 1), o_end, pitch)
                _fetch(ahead, x_ptr, x_off, step, x_ok, o + (LAG + STAGES - 1), h_first, h_end, pitch, C)
                if (o >= 0) & (o < o_end):
                    slot = ends.index(h % STAGES)
                    _store_row(done, slot, place, o, C, WARPS, STORE, BIAS, RESIDUAL, EARLY, STATS, dtype)
        for s in gl.static_range(TAIL):
            h = GROUPS * TAPS + s
            async_copy.wait_group(STAGES - 2)
            a = _operands(rows.index(h % STAGES).load(READ), WIDE_ROW, WARPS, A, dtype)
            done, acc = _accumulate(a, acc, band, zero, s, TAPS)
            o = _row_here(h) - LAG
            ahead = rows.index((h + STAGES - 1) % STAGES)
            if EARLY:
                end = ends.index((h + STAGES - 1) % STAGES)
                _fetch_residual(end, r_ptr, u_off, shift, u_ok, o + (STAGES - 1), o_end, pitch)
            _fetch(ahead, x_ptr, x_off, step, x_ok, o + (LAG + STAGES - 1), h_first, h_end, pitch, C)
            if (o >= 0) & (o < o_end):
                slot = ends.index(h % STAGES)
                _store_row(done, slot, place, o, C, WARPS, STORE, BIAS, RESIDUAL, EARLY, STATS, dtype)
        async_copy.wait_group(0)
        if not SPLIT:
            for s in gl.static_range(HALF):
                done = ()
                for i in gl.static_range(4):
                    done = done + (acc[i * TAPS + (TAIL + s) % TAPS],)
                o = _row_here(H) - HALF + s
                if o >= 0:
                    slot = ends.index((GROUPS * TAPS + TAIL + s) % STAGES)
                    _store_row(done, slot, place, o, C, WARPS, STORE, BIAS, RESIDUAL, EARLY, STATS, dtype)
        # The rows' memory is not reused here: the last store's scratch buffer would collide with pending copies.
        rows._keep_alive()
        if EARLY:
            ends._keep_alive()


def row_layouts(warps: int, itemsize: int) -> tuple[object, object]:
    """How threads copy rows of 4·warps channels to shared memory, 16 bytes each, and how these are swizzled there."""
    block = warps * 4
    vec = 16 // itemsize  # channels of a 16-byte copy
    copy = gl.BlockedLayout([1, vec], [32 * vec // block, block // vec], [warps, 1], [1, 0])
    banks = max(128 // (block * itemsize), 1)  # rows of shared memory side by side in the 32 banks
    return copy, gl.SwizzledSharedLayout(vec, banks, block // vec, [1, 0])


@functools.cache
def _layouts(warps: int, itemsize: int, statistics: bool, end_itemsize: int) -> dict[str, object]:
    """How threads copy rows (COPY), how shared memory is swizzled, who reads (READ) and who stores (STORE) what.

    A row of shared memory is one pixel's 4·warps channels. The index of a pixel has its bits in the order that puts the
    lanes that read together into different banks: see _operands.
    """
    block = warps * 4
    copy, shared = row_layouts(warps, itemsize)
    channel = [[0, 1 << i] for i in range(block.bit_length() - 1)]
    if itemsize == 4:  # two copies of 16 bytes per thread, of pixels with the same p: a constant apart
        threads = [*channel[2:], *([1 << i, 0] for i in (0, 1, 3, 4, 5))]
        copy = gl.DistributedLinearLayout([*channel[:2], [4, 0]], threads[:5], threads[5:], [], [64, block])
    # Bits of a pixel's index: the lanes' pair bits 0, 1, 2 and k bits 1, 2, then pair + 8, k + 1, k + 8 in registers.
    lane_k, lane_pair = ([2, 4], [1, 8, 16]) if itemsize == 4 else ([4, 8], [1, 2, 16])
    registers = [[0, 1], [0, 2], [64, 0], [32, 0], [128, 0]]
    lanes = [[bit, 0] for bit in (*lane_k, *lane_pair)]
    owners = [[0, 4 << i] for i in range(warps.bit_length() - 1)]
    read = gl.DistributedLinearLayout(registers, lanes, owners, [], [256, block])
    # Dimensions pair, j/4, j/2%2, j%2, channel. A thread stores 16 bytes at a time, so that those of neighbours make
    # whole sectors; the statistics need a pixel in 4 lanes.
    piece = 4 if end_itemsize == 4 or (block == 16 and statistics) else 8
    pair = [[1 << i, 0, 0, 0, 0] for i in range(4)]
    j0, j1, j2 = ([0] * (3 - i) + [1] + [0] * (1 + i) for i in range(3))
    channel = [[0, 0, 0, *bit] for bit in channel]
    if piece == 4:
        held, across = [*channel[:2], j2, j1], [*channel[2:], j0, *pair]
    else:
        held, across = [*channel[:3], j2], [*channel[3:], j0, j1, *pair]
    store = gl.DistributedLinearLayout(held, across[:5], across[5:], [], [16, 2, 2, 2, block])
    ends = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    return {"COPY": copy, "SHARED": shared, "READ": read, "STORE": store, "PIECE": piece, "ENDS": ends}


def supports(x: torch.Tensor) -> bool:
    """Whether this form supports ``x`` (N, H, W, C); a tensor without an address is assumed to be aligned."""
    nvidia = x.device.type != "xpu" and target_of(x).startswith("sm_")
    return AVAILABLE and nvidia and x.shape[3] % 8 == 0 and _aligned(x)


def _aligned(x: torch.Tensor | None) -> bool:
    """Whether ``x`` is given and is aligned for copies of 16 bytes."""
    return x is not None and (is_traced(x) or x.is_meta or x.data_ptr() % 16 == 0)


def dwconv_gluon(
    x, weight, bias, residual, *, dtype, out_dtype, flip, statistics, config=None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ``dwconv_tensor_core``, where ``supports(x)``."""
    batch, height, width, channels = x.shape
    taps = weight.shape[-1]
    block = stats_block(channels, dtype)
    default = gluon_config(tuple(x.shape), taps, block, x.element_size(), target_of(x))
    candidates = (config,) if config else segment_candidates(default, height)
    u = x.new_empty(x.shape, dtype=out_dtype)
    blocks = cdiv(channels, block)
    stats = None
    if statistics:
        stats = x.new_empty((blocks, batch * height * width, 2), dtype=torch.float32)
    if x.numel() == 0:
        return u, stats
    tiles = cdiv(width, 8)
    images = 16 // tiles + 2
    # With statistics nothing is added and u is of 16 bits.
    end_itemsize = 2 if statistics else max(u.element_size(), 0 if residual is None else residual.element_size())

    def run(config: GluonConfig) -> None:
        split = config.segment < height or height < taps
        segments = cdiv(height, config.segment)
        rows = config.segment + taps - 1 if split else height
        launch(
            dwconv_gluon_kernel,
            (blocks * segments * cdiv(batch * tiles, 16),),
            x, weight, weight if bias is None else bias, x if residual is None else residual, u,
            u if stats is None else stats,
            batch, height, width, tiles, config.segment, segments, rows // taps,
            C=channels, TAPS=taps, WARPS=block // 4, TAIL=rows % taps, SPLIT=split, FLIP=flip, BIAS=bias is not None,
            RESIDUAL=residual is not None, STATS=statistics, STAGES=config.stages,
            EARLY=_aligned(residual) and residual_early(config, taps, block, residual.element_size(), target_of(x)),
            WIDE_ROW=x.element_size() == 4, WIDE=images * height * width * channels >= 2**31,
            dtype=gl.bfloat16 if dtype == torch.bfloat16 else gl.float16, num_warps=block // 4,
            **_layouts(block // 4, x.element_size(), statistics, end_itemsize),
        )  # fmt: skip

    residual_dtype = None if residual is None else residual.dtype
    given = channels, height, width, taps, x.dtype, out_dtype, flip, statistics, bias is None, residual_dtype
    run(fastest(dwconv_gluon_kernel, run, candidates, x, batch, given))
    return u, stats
