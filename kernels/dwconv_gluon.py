"""The depthwise convolution of dwconv_tensor_core.py with explicit layouts, for NVIDIA: fewer instructions an output.

Formula, tiles, pairs, segments, the band matrices T and what NaNs reach are as in dwconv_tensor_core.py. What differs
is how the rows are fed. A warp owns 4 channels. Rows of x come by cp.async, STAGES − 1 rows early, into shared memory,
whose order lets every thread read its fragments of the matrix product, 4 channels at a time, without bank conflicts;
registers are renamed, never shuffled. A finished row goes through shared memory once, to leave in whole sectors and to
have its statistics taken where 8 channels of a pixel sit in one thread.

Needs C to be a multiple of 8, x aligned to 16 bytes, and Gluon as Triton 3.9 has it (``AVAILABLE``).
"""

# ruff: noqa: RUF005 (a kernel grows a tuple by +, it has no starred expressions)
from __future__ import annotations

import os

import torch
import triton

from .launching import launch
from .statistics import stats_block
from .targets import target_of
from .tuning_dwconv import GluonConfig, gluon_config

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

    AVAILABLE = hasattr(async_copy, "async_load") and os.environ.get("TRITON_INTERPRET") != "1"
except ImportError:
    AVAILABLE = False

if AVAILABLE:

    @gluon.jit
    def _fetch(rows, x_ptr, x_off, x_ok, h, h_first, H, pitch, STAGES: gl.constexpr, SPLIT: gl.constexpr):
        """Start the copy of input row ``h`` of every pair's segment; zeros outside the image.

        Below a whole image nothing is used, so the last row comes again.
        """
        if SPLIT:
            ok = x_ok & ((h_first + h >= 0) & (h_first + h < H))[:, None]
            row_ptr = x_ptr + h * pitch
        else:
            ok = x_ok
            row_ptr = x_ptr + gl.minimum(h, H - 1) * pitch
        async_copy.async_load(rows.index(h % STAGES), row_ptr + x_off, mask=ok)
        async_copy.commit_group()

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
    def _accumulate(a, acc, band, start, s: gl.constexpr, TAPS: gl.constexpr):
        """Add an input row, the s-th modulo TAPS, to all open output rows: (the row it completes, the open rows)."""
        done = ()
        rows = ()
        for i in gl.static_range(4 * TAPS):
            new = mma_v2(a[i // TAPS], band[i // TAPS * TAPS + TAPS - 1 - (i % TAPS - s + TAPS) % TAPS], acc[i])
            if i % TAPS == s:
                done = done + (new,)
                rows = rows + (start[i // TAPS],)
            else:
                rows = rows + (new,)
        return done, rows

    @gluon.jit
    def _store_statistics(u, stats_ptr, at, ok, c_ok, count, WARPS: gl.constexpr, EVEN_C: gl.constexpr):
        """(mean, M2) of each row of u (128 pixels, 4·WARPS channels) to the pairs ``at``.

        bfloat16: Σu and Σu² are products of the matrix unit with ones and with uᵀ (the diagonal), for a thread holds u
        as an operand already, up to the order of the channels, which no sum minds. M2 = Σu² − (Σu)²/n then errs by
        about 2^-23 of the squared mean, a tenth of what rounding u to bfloat16 has put there. float16 takes two passes.
        """
        if u.dtype == gl.bfloat16:
            CB: gl.constexpr = WARPS * 4
            MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
            A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
            B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
            bits = gl.reshape(u, [8 // WARPS, 2, WARPS, 8, 4, CB // 8, 2])
            tiles = gl.reshape(gl.permute(bits, [0, 2, 1, 3, 5, 4, 6]), [8, 16, CB])
            a = gl.convert_layout(tiles, A, assert_trivial=True)
            zero = gl.full([8, 16, 16], 0.0, gl.float32, layout=MMA)
            half = mma_v2(
                a,
                gl.full([8, CB, 8], 1.0, gl.bfloat16, layout=B),
                gl.full([8, 16, 8], 0.0, gl.float32, layout=MMA),
            )
            twice = gl.reshape(gl.permute(gl.join(half, half), [0, 1, 3, 2]), [8, 16, 16])
            total = gl.convert_layout(twice, MMA, assert_trivial=True)
            square = mma_v2(a, gl.convert_layout(gl.permute(tiles, [0, 2, 1]), B, assert_trivial=True), zero)
            total_even, total_odd = gl.split(gl.reshape(total, [8, 16, 8, 2]))
            square_even, square_odd = gl.split(gl.reshape(square, [8, 16, 8, 2]))
            HALVES: gl.constexpr = total_even.type.layout
            row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, HALVES)))[None, :, None]
            column = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, HALVES)))[None, None, :]
            total = gl.where(row % 2 == 0, total_even, total_odd)
            square = gl.where(row % 2 == 0, square_even, square_odd)
            mean = total * (1.0 / count)
            m2 = square - total * mean
            pixels = gl.permute(gl.reshape(at, [8 // WARPS, 2, WARPS, 8]), [0, 2, 1, 3])
            inside = gl.permute(gl.reshape(ok, [8 // WARPS, 2, WARPS, 8]), [0, 2, 1, 3])
            at = gl.convert_layout(gl.reshape(pixels, [8, 16]), gl.SliceLayout(2, HALVES), assert_trivial=True)
            ok = gl.convert_layout(gl.reshape(inside, [8, 16]), gl.SliceLayout(2, HALVES), assert_trivial=True)
            at = at[:, :, None] * 2
            ok = ok[:, :, None] & (row // 2 == column)
            gl.store(stats_ptr + at + column * 0, mean, mask=ok)
            gl.store(stats_ptr + at + 1 + column * 0, gl.where(m2 < 0.0, 0.0, m2), mask=ok)
        else:
            u = u.to(gl.float32)
            mean = gl.sum(u, 1) * (1.0 / count)
            centred = u - mean[:, None]
            if not EVEN_C:
                centred = gl.where(c_ok[None, :], centred, 0.0)
            m2 = gl.sum(centred * centred, 1)
            gl.store(stats_ptr + at * 2, mean, mask=ok)
            gl.store(stats_ptr + at * 2 + 1, m2, mask=ok)

    @gluon.jit
    def _store_row(
        done, u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, c_ok, count, o, o_first, SEGMENT, H, W, pitch,
        WARPS: gl.constexpr, STORE: gl.constexpr, SPLIT: gl.constexpr, RESIDUAL: gl.constexpr, STATS: gl.constexpr,
        EVEN_C: gl.constexpr, MAY_PRECEDE: gl.constexpr, dtype: gl.constexpr,
    ):  # fmt: skip
        """Round four channels' (WARPS, 16, 8) sums, bring them to (128 pixels, 4·WARPS channels) and store."""
        quads = gl.join(gl.join(done[0].to(dtype), done[2].to(dtype)), gl.join(done[1].to(dtype), done[3].to(dtype)))
        rows = gl.permute(gl.reshape(quads, [WARPS, 16, 8, 4]), [1, 2, 0, 3])
        u = gl.convert_layout(gl.reshape(rows, [128, WARPS * 4]), STORE)
        if MAY_PRECEDE:
            u_ok = u_ok & (o >= 0)
            s_ok = s_ok & (o >= 0)
        if SPLIT:
            u_ok = u_ok & ((o < SEGMENT) & (o_first + o < H))[:, None]
            s_ok = s_ok & (o < SEGMENT) & (o_first + o < H)
        to = u_ptr + o * pitch + u_off
        if RESIDUAL:
            sum = u.to(gl.float32) + gl.load(r_ptr + o * pitch + u_off, mask=u_ok, other=0.0).to(gl.float32)
            gl.store(to, sum.to(u_ptr.dtype.element_ty), mask=u_ok)
        else:
            gl.store(to, u.to(u_ptr.dtype.element_ty), mask=u_ok)
        if STATS:
            _store_statistics(u, stats_ptr + o * W * 2, s_off, s_ok, c_ok, count, WARPS, EVEN_C)

    @gluon.jit
    def _pixels(pixel, pair_first, n_first, N, H, W, WT, SEGMENT, SEGMENTS, SPLIT: gl.constexpr, WIDE: gl.constexpr):
        """Of output pixels 8·pair + j: (offset from image n_first, whether inside, first row of the segment)."""
        pair = pair_first + pixel // 8
        n = pair // (WT * SEGMENTS)
        j = pair % WT * 8 + pixel % 8
        o_first = pair * 0
        if SPLIT:
            o_first = pair // WT % SEGMENTS * SEGMENT
        n_off = n - n_first
        if WIDE:
            n_off = n_off.to(gl.int64)
        return (n_off * H + o_first) * W + j, (n < N) & (j < W), o_first

    @gluon.jit
    def dwconv_gluon_kernel(
        x_ptr, w_ptr, b_ptr, r_ptr, u_ptr, stats_ptr, N, H, W, C8, WT, SEGMENT, SEGMENTS, GROUPS,
        TAPS: gl.constexpr, WARPS: gl.constexpr, TAIL: gl.constexpr, SPLIT: gl.constexpr, FLIP: gl.constexpr,
        BIAS: gl.constexpr, RESIDUAL: gl.constexpr, STATS: gl.constexpr, EVEN_C: gl.constexpr, STAGES: gl.constexpr,
        WIDE_ROW: gl.constexpr, WIDE: gl.constexpr, COPY: gl.constexpr, SHARED: gl.constexpr, READ: gl.constexpr,
        STORE: gl.constexpr, dtype: gl.constexpr,
    ):  # fmt: skip
        """As dwconv_tensor_core_kernel, with C = 8·C8 and CB = 4·WARPS; WIDE_ROW: x is float32."""
        HALF: gl.constexpr = TAPS // 2
        LAG: gl.constexpr = 2 * HALF if SPLIT else HALF
        CB: gl.constexpr = WARPS * 4
        MMA: gl.constexpr = gl.NVMMADistributedLayout(
            version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
        )
        A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
        B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
        C = C8 * 8
        NB = gl.cdiv(C, CB)
        block = gl.program_id(0) % NB
        c_first = block * CB
        pair_first = gl.program_id(0) // NB * 16
        n_first = pair_first // (WT * SEGMENTS)
        zero64 = gl.to_tensor(0).to(gl.int64)
        pitch = W * C
        if WIDE:
            pitch = (zero64 + W) * C
        pixels = (zero64 + n_first) * H * W
        x_ptr += pixels * C
        u_ptr += pixels * C
        r_ptr += pixels * C
        stats_ptr += ((zero64 + block) * N * H * W + pixels) * 2

        r = gl.arange(0, 256, layout=gl.SliceLayout(1, COPY))
        if WIDE_ROW:
            p = (r & 1) | (((r >> 3) & 7) << 1)
            k = (((r >> 1) & 3) << 1) | ((r >> 6) & 1) | ((r >> 7) << 3)
        else:
            p = (r & 3) | (((r >> 4) & 3) << 2)
            k = (((r >> 2) & 3) << 1) | ((r >> 6) & 1) | ((r >> 7) << 3)
        pair = pair_first + p
        n = pair // (WT * SEGMENTS)
        iw = pair % WT * 8 + k - HALF
        x_ok = ((n < N) & (iw >= 0) & (iw < W) & (k < 8 + TAPS - 1))[:, None]
        c = c_first + gl.arange(0, CB, layout=gl.SliceLayout(0, COPY))
        if EVEN_C:
            x_ok = x_ok & (c >= 0)[None, :]
        else:
            x_ok = x_ok & (c < C)[None, :]
        h_first = pair * 0
        if SPLIT:
            h_first = pair // WT % SEGMENTS * SEGMENT - HALF
        row_in = (n - n_first) * H + h_first
        if WIDE:
            row_in = (n - n_first).to(gl.int64) * H + h_first
        x_off = ((row_in * W + iw) * C)[:, None] + c[None, :]
        rows = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, 256, CB], SHARED)
        for d in gl.static_range(STAGES - 1):
            _fetch(rows, x_ptr, x_off, x_ok, d, h_first, H, pitch, STAGES, SPLIT)

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
            if not EVEN_C:
                ok = tap_ok & (c_first + bw * 4 + i // TAPS < C)
            tap = gl.load(w_ptr + at, mask=ok, other=0.0)
            band = band + (tap.to(dtype),)
        m_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
        flat = gl.full([WARPS, 16, 8], 0, gl.int32, layout=MMA)
        start = ()
        for i in gl.static_range(4):
            if BIAS:
                at = c_first + m_warp * 4 + i + flat
                ok = at >= 0
                if not EVEN_C:
                    ok = at < C
                start = start + (gl.load(b_ptr + at, mask=ok, other=0.0).to(gl.float32),)
            else:
                start = start + (flat.to(gl.float32),)
        acc = ()
        for i in gl.static_range(4 * TAPS):
            acc = acc + (start[i // TAPS],)

        o_pixel = gl.arange(0, 128, layout=gl.SliceLayout(1, STORE))
        o_c = c_first + gl.arange(0, CB, layout=gl.SliceLayout(0, STORE))
        c_ok = o_c < C
        u_off, u_ok, o_first = _pixels(o_pixel, pair_first, n_first, N, H, W, WT, SEGMENT, SEGMENTS, SPLIT, WIDE)
        s_off = u_off
        s_ok = u_ok
        u_off = (u_off * C)[:, None] + o_c[None, :]
        u_ok = u_ok[:, None] & c_ok[None, :]
        count = gl.minimum(C - c_first, CB).to(gl.float32)

        for g in range(GROUPS):
            for s in gl.static_range(TAPS):
                h = g * TAPS + s
                async_copy.wait_group(STAGES - 2)
                a = _operands(rows.index(h % STAGES).load(READ), WIDE_ROW, WARPS, A, dtype)
                done, acc = _accumulate(a, acc, band, start, s, TAPS)
                _fetch(rows, x_ptr, x_off, x_ok, h + STAGES - 1, h_first, H, pitch, STAGES, SPLIT)
                if s >= LAG:
                    _store_row(
                        done, u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, c_ok, count, h - LAG, o_first,
                        SEGMENT, H, W, pitch, WARPS, STORE, SPLIT, RESIDUAL, STATS, EVEN_C, False, dtype,
                    )  # fmt: skip
                else:
                    if g > 0:
                        _store_row(
                            done, u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, c_ok, count, h - LAG, o_first,
                            SEGMENT, H, W, pitch, WARPS, STORE, SPLIT, RESIDUAL, STATS, EVEN_C, False, dtype,
                        )  # fmt: skip
        for s in gl.static_range(TAIL):
            h = GROUPS * TAPS + s
            async_copy.wait_group(STAGES - 2)
            a = _operands(rows.index(h % STAGES).load(READ), WIDE_ROW, WARPS, A, dtype)
            _fetch(rows, x_ptr, x_off, x_ok, h + STAGES - 1, h_first, H, pitch, STAGES, SPLIT)
            done, acc = _accumulate(a, acc, band, start, s, TAPS)
            _store_row(
                done, u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, c_ok, count, h - LAG, o_first,
                SEGMENT, H, W, pitch, WARPS, STORE, SPLIT, RESIDUAL, STATS, EVEN_C, True, dtype,
            )  # fmt: skip
        async_copy.wait_group(0)
        if not SPLIT:
            for s in gl.static_range(HALF):
                done = ()
                for i in gl.static_range(4):
                    done = done + (acc[i * TAPS + (TAIL + s) % TAPS],)
                _store_row(
                    done, u_ptr, r_ptr, u_off, u_ok, stats_ptr, s_off, s_ok, c_ok, count, H - HALF + s, o_first,
                    SEGMENT, H, W, pitch, WARPS, STORE, SPLIT, RESIDUAL, STATS, EVEN_C, True, dtype,
                )  # fmt: skip


def _layouts(warps: int, itemsize: int) -> dict[str, object]:
    """How threads copy rows (COPY), how shared memory is swizzled, who reads (READ) and who stores (STORE) what.

    A row of shared memory is one pixel's 4·warps channels. The index of a pixel has its bits in the order that puts the
    lanes that read together into different banks: see _operands.
    """
    block = warps * 4
    vec = 16 // itemsize  # channels of a 16-byte copy
    copy = gl.BlockedLayout([1, vec], [32 * vec // block, block // vec], [warps, 1], [1, 0])
    banks = max(128 // (block * itemsize), 1)  # rows of shared memory side by side in the 32 banks
    shared = gl.SwizzledSharedLayout(vec, banks, block // vec, [1, 0])
    # Bits of a pixel's index: the lanes' pair bits 0, 1, 2 and k bits 1, 2, then pair + 8, k + 1, k + 8 in registers.
    lane_k, lane_pair = ([2, 4], [1, 8, 16]) if itemsize == 4 else ([4, 8], [1, 2, 16])
    registers = [[0, 1], [0, 2], [64, 0], [32, 0], [128, 0]]
    lanes = [[bit, 0] for bit in (*lane_k, *lane_pair)]
    owners = [[0, 4 << i] for i in range(warps.bit_length() - 1)]
    read = gl.DistributedLinearLayout(registers, lanes, owners, [], [256, block])
    store = gl.BlockedLayout([1, warps], [8, 4], [warps, 1], [1, 0])
    return {"COPY": copy, "SHARED": shared, "READ": read, "STORE": store}


def serves(x: torch.Tensor) -> bool:
    """Whether this form can take ``x`` (N, H, W, C); a tensor that a compiler traces cannot show its address."""
    if not AVAILABLE or type(x) not in (torch.Tensor, torch.nn.Parameter) or not target_of(x).startswith("sm_"):
        return False
    return x.shape[3] % 8 == 0 and (x.is_meta or x.data_ptr() % 16 == 0)


def dwconv_gluon(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    flip: bool,
    statistics: bool,
    config: GluonConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ``dwconv_tensor_core``, where ``serves(x)``."""
    batch, height, width, channels = x.shape
    taps = weight.shape[-1]
    block = stats_block(channels, dtype)
    config = config or gluon_config(tuple(x.shape), taps, block, x.element_size(), target_of(x))
    u = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    blocks = triton.cdiv(channels, block)
    stats = None
    if statistics:
        stats = torch.empty((blocks, batch * height * width, 2), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return u, stats
    tiles = triton.cdiv(width, 8)
    split = config.segment < height
    segments = triton.cdiv(height, config.segment)
    rows = config.segment + taps - 1 if split else height
    images = 16 // (tiles * segments) + 2
    launch(
        dwconv_gluon_kernel,
        (blocks * triton.cdiv(batch * segments * tiles, 16),),
        x, weight, weight if bias is None else bias, x if residual is None else residual, u,
        u if stats is None else stats,
        batch, height, width, channels // 8, tiles, config.segment, segments, rows // taps,
        TAPS=taps, WARPS=block // 4, TAIL=rows % taps, SPLIT=split, FLIP=flip, BIAS=bias is not None,
        RESIDUAL=residual is not None, STATS=statistics, EVEN_C=channels % block == 0, STAGES=config.stages,
        WIDE_ROW=x.element_size() == 4, WIDE=images * height * width * channels >= 2**31,
        dtype=gl.bfloat16 if dtype == torch.bfloat16 else gl.float16, num_warps=block // 4,
        **_layouts(block // 4, x.element_size()),
    )  # fmt: skip
    return u, stats
