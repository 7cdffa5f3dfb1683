"""The weight gradient of wgrad.py's tensor-core form with explicit layouts, for NVIDIA, fed with rows as in gluon.py.

    dT[c, ky] += A_h[c]ᵀ · dU_{h + k//2 − ky}[c]        (16, 16) · (16, 8)      k products per channel and input row h

Tiles, pairs, the ring of du and the partial sums are as in wgrad.py. A warp owns 4 channels. Step t needs row t of du
and row t − k//2 of x. cp.async copies both, STAGES − 1 steps early, to buffers of shared memory whose order lets
every thread read its fragments of the products, 4 channels at a time; registers are renamed, never shuffled. Each
buffer is a variable of its own, so the compiler sees that a step's copies do not touch what the step reads, and one
barrier per step is enough. For this, steps are unrolled, UNROLL at a time; rows of du after the last one are zeros.

Needs what gluon.py needs, of x and of du.
"""

# ruff: noqa: RUF005 (a kernel grows a tuple by +, it has no starred expressions)
from __future__ import annotations

import functools

import torch

from ..autotuning import fastest
from ..integers import cdiv
from ..launching import launch
from ..targets import target_of
from .gluon import AVAILABLE, row_layouts, supports
from .tuning import GluonWgradConfig, gluon_wgrad_candidates, gluon_wgrad_config, gluon_wgrad_split

SLOTS = 8  # taps of a kernel row, padded: the last holds the bias gradient

if AVAILABLE:
    from .gluon import _row_here, async_copy, async_load, gl, gluon, mma_v2

    @gluon.jit
    def _places(
        ptr, here, pair_first, n_first, c_first, N, H, W, WT, HALF: gl.constexpr, PIXELS: gl.constexpr,
        C: gl.constexpr, CB: gl.constexpr, COPY: gl.constexpr, WIDE: gl.constexpr,
    ):  # fmt: skip
        """What `_copy` needs for PIXELS pixels of 16 tiles, the first of which is HALF pixels left of its tile.

        A thread copies pixels ``step`` apart, so its addresses differ by constants; ``first`` is the column of the
        first of them, far right beyond the last image or channel.
        """
        ONCE: gl.constexpr = 8 * COPY.size_per_thread[1]  # what all threads copy at a time; see _words for the bits
        r = gl.arange(0, 16 * PIXELS, layout=gl.SliceLayout(1, COPY))
        step = (r & -ONCE) >> 4
        r = ((r & (ONCE - 1)) + here) & (ONCE - 1)
        k = ((r >> 2) & 1) | (((r >> 5) & 1) << 1)
        pair = pair_first + (((r & 3) << 1) | ((r >> 3) & 1) | (((r >> 4) & 1) << 3))
        n = pair // WT
        first = (pair % WT * 8 + k - HALF)[:, None]
        c = (c_first + gl.arange(0, CB, layout=gl.SliceLayout(0, COPY)))[None, :]
        image = (n - n_first) * H
        if WIDE:
            image = (n - n_first).to(gl.int64) * H
        off = (image[:, None] * W + first) * C + c
        first = gl.where((n < N)[:, None] & (c < C), first, 2**30)
        return ptr, off, first, step[:, None], (step + k < 8 + 2 * HALF)[:, None]

    @gluon.jit
    def _copy(buffer, places, row_off, columns, C: gl.constexpr, HALF: gl.constexpr):
        """Start the copies of a row of ``columns`` columns, zeros elsewhere."""
        ptr, off, first, step, needed = places
        ok = (first < columns - step) & ((first >= -step) | (step >= HALF)) & needed
        async_load(buffer, ptr + row_off + off + step * C, mask=ok)

    @gluon.jit
    def _fetch(x_buffer, du_buffer, x, du, t, H, W, pitch, C: gl.constexpr, HALF: gl.constexpr):
        """Start the copies of step ``t``; rows outside the image are zeros."""
        _copy(x_buffer, x, t * pitch, gl.where((t >= HALF) & (t < H + HALF), W, 0), C, HALF)
        _copy(du_buffer, du, t * pitch, gl.where(t < H, W, 0), C, 0)
        async_copy.commit_group()

    @gluon.jit
    def _four(values):
        """(…, 4) -> the four along the last dimension."""
        even, odd = gl.split(gl.reshape(values, values.shape[:-1] + [2, 2]))
        c0, c2 = gl.split(even)
        c1, c3 = gl.split(odd)
        return c0, c1, c2, c3

    @gluon.jit
    def _words(row, WARPS: gl.constexpr, dtype: gl.constexpr):
        """Eight pixels of 16 tiles -> four (WARPS, 8, 8), one a channel, pairs of tiles by pixels.

        A word is two tiles' values, for a loop would carry 16 bits in a register of their own.
        """
        # The bits of a row's index: k2 k1 p3 p0 k0 p2 p1.
        bits = gl.permute(gl.reshape(row, [2, 2, 2, 2, 2, 2, 2, WARPS, 4]), [7, 2, 5, 6, 0, 1, 4, 3, 8])
        channels = _four(gl.reshape(bits, [WARPS, 8, 8, 2, 4]))
        words = ()
        for i in gl.static_range(4):
            even, odd = gl.split(channels[i].to(dtype))
            word = gl.inline_asm_elementwise(
                "mov.b32 $0, {$1, $2};", "=r,h,h", [even, odd], dtype=gl.int32, is_pure=True, pack=1
            )
            words = words + (word,)
        return words

    @gluon.jit
    def _halves(words, dtype: gl.constexpr):
        """Words -> (…, 2) of ``dtype``."""
        even, odd = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
        )
        return gl.join(even, odd).to(dtype, bitcast=True)

    @gluon.jit
    def _replace(ring, words, slot: gl.constexpr, TAPS: gl.constexpr):
        """The ring, ``TAPS`` rows a channel, with ``words`` in ``slot``."""
        new = ()
        for i in gl.static_range(4 * TAPS):
            if i % TAPS == slot:
                new = new + (words[i // TAPS],)
            else:
                new = new + (ring[i],)
        return new

    @gluon.jit
    def _correlate(
        row, ring, acc, s: gl.constexpr, TAPS: gl.constexpr, WARPS: gl.constexpr, READ: gl.constexpr, A: gl.constexpr,
        B: gl.constexpr, dtype: gl.constexpr,
    ):  # fmt: skip
        """Add input row h = s (mod TAPS) times the rows of du in the ring to dT."""
        upper = _words(row.slice(0, 128).load(READ), WARPS, dtype)
        lower = _words(row.slice(128, 128).load(READ), WARPS, dtype)
        ones: gl.constexpr = 0x3F803F80 if dtype == gl.bfloat16 else 0x3C003C00
        k = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, lower[0].type.layout)))[None, None, :]
        a = ()
        for i in gl.static_range(4):
            words = gl.permute(gl.join(upper[i], gl.where(k == 7, ones, lower[i])), [0, 3, 2, 1])
            halves = gl.reshape(_halves(words, dtype), [WARPS, 16, 16])
            a = a + (gl.convert_layout(halves, A, assert_trivial=True),)
        new = ()
        for i in gl.static_range(4 * TAPS):
            words = ring[i // TAPS * TAPS + (s + TAPS // 2 - i % TAPS + TAPS) % TAPS]
            halves = gl.reshape(gl.permute(_halves(words, dtype), [0, 1, 3, 2]), [WARPS, 16, 8])
            new = new + (mma_v2(a[i // TAPS], gl.convert_layout(halves, B, assert_trivial=True), acc[i]),)
        return new

    @gluon.jit
    def _rotate(ring, by: gl.constexpr, TAPS: gl.constexpr):
        """The ring with slot ``by`` as slot 0."""
        new = ()
        for i in gl.static_range(4 * TAPS):
            new = new + (ring[i // TAPS * TAPS + (i + by) % TAPS],)
        return new

    @gluon.jit
    def _store_taps(
        acc, partial_ptr, c_first, ky: gl.constexpr, C: gl.constexpr, TAPS: gl.constexpr, WARPS: gl.constexpr,
        SLOTS: gl.constexpr,
    ):  # fmt: skip
        """Store the sums along the diagonals of dT[ky], as wgrad.py takes them, four channels at a time."""
        quads = gl.join(gl.join(acc[ky], acc[2 * TAPS + ky]), gl.join(acc[TAPS + ky], acc[3 * TAPS + ky]))
        upper, lower = gl.split(gl.permute(gl.reshape(quads, [WARPS, 2, 8, 8, 4]), [0, 2, 3, 4, 1]))
        HALVES: gl.constexpr = upper.type.layout
        SUMS: gl.constexpr = gl.SliceLayout(2, HALVES)
        i = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, HALVES))))[None, :, None, None]
        j = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, HALVES))))[None, None, :, None]
        diagonal, _ = gl.broadcast((i + j) % 8, upper)
        taps = gl.sum(gl.gather(gl.where(i >= j, upper, lower), diagonal, 1), 2)
        kx = gl.arange(0, SLOTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))[None, :, None]
        if ky == TAPS // 2:
            bias = gl.sum(gl.sum(gl.where(i == 7, lower, 0.0), 2), 1)
            taps = gl.where(kx == SLOTS - 1, gl.convert_layout(bias, gl.SliceLayout(1, SUMS))[:, None, :], taps)
        w = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))[:, None, None]
        c = c_first + w * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, SUMS)))[None, None, :]
        gl.store(partial_ptr + (ky * SLOTS + kx) * C + c, taps, mask=(c < C) & (kx >= 0))

    @gluon.jit(do_not_specialize=("N", "H", "W", "WT", "PAIRS", "SPLIT_PAIRS", "GROUPS"))
    def dwconv_wgrad_gluon_kernel(
        x_ptr, du_ptr, partial_ptr, N, H, W, WT, PAIRS, SPLIT_PAIRS, GROUPS,
        C: gl.constexpr, TAPS: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, UNROLL: gl.constexpr,
        WIDE: gl.constexpr, X_COPY: gl.constexpr, X_SHARED: gl.constexpr, DU_COPY: gl.constexpr,
        DU_SHARED: gl.constexpr, READ: gl.constexpr, SLOTS: gl.constexpr, dtype: gl.constexpr,
    ):  # fmt: skip
        """As dwconv_wgrad_tensor_core_kernel, with DB = 4·WARPS, and H at most GROUPS·UNROLL; x may be float32."""
        HALF: gl.constexpr = TAPS // 2
        CB: gl.constexpr = WARPS * 4
        MMA: gl.constexpr = gl.NVMMADistributedLayout(
            version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
        )
        A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
        B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
        NB: gl.constexpr = (C + CB - 1) // CB
        c_first = gl.program_id(0) % NB * CB
        split = gl.program_id(0) // NB
        zero64 = gl.to_tensor(0).to(gl.int64)
        pitch = W * C
        if WIDE:
            pitch = (zero64 + W) * C
        xs = ()
        dus = ()
        for _ in gl.static_range(STAGES):
            xs = xs + (gl.allocate_shared_memory(x_ptr.dtype.element_ty, [256, CB], X_SHARED),)
            dus = dus + (gl.allocate_shared_memory(dtype, [128, CB], DU_SHARED),)
        acc = ()
        for _ in gl.static_range(4 * TAPS):
            acc = acc + (gl.full([WARPS, 16, 8], 0.0, gl.float32, layout=MMA),)

        pairs_end = gl.minimum((split + 1) * SPLIT_PAIRS, PAIRS)
        gl.assume(split * SPLIT_PAIRS < pairs_end)
        for pair_first in range(split * SPLIT_PAIRS, pairs_end, 16):
            # 0, which the compiler cannot know: what it is added to is computed here, not before the loop and kept.
            here = _row_here(pair_first) - pair_first
            n_first = pair_first // WT
            origin = (zero64 + n_first) * (H + here) * W * C
            x_first = x_ptr + origin - (HALF + here) * pitch
            x = _places(x_first, here, pair_first, n_first, c_first, N, H, W, WT, HALF, 16, C, CB, X_COPY, WIDE)
            du = _places(du_ptr + origin, here, pair_first, n_first, c_first, N, H, W, WT, 0, 8, C, CB, DU_COPY, WIDE)
            for t in gl.static_range(STAGES - 1):
                _fetch(xs[t], dus[t], x, du, t, H, W, pitch, C, HALF)
            zeros = _words(gl.full([128, CB], 0.0, dtype, layout=READ), WARPS, dtype)
            ring = ()
            for _ in gl.static_range(TAPS):
                ring = ring + zeros
            for t in gl.static_range(HALF):
                async_copy.wait_group(STAGES - 2)
                ring = _replace(ring, _words(dus[t % STAGES].load(READ), WARPS, dtype), t, TAPS)
                _fetch(
                    xs[(t + STAGES - 1) % STAGES], dus[(t + STAGES - 1) % STAGES], x, du, t + STAGES - 1, H, W, pitch,
                    C, HALF,
                )  # fmt: skip
            gl.assume(GROUPS >= 1)
            for g in range(GROUPS):
                for s in gl.static_range(UNROLL):
                    async_copy.wait_group(STAGES - 2)
                    row = _words(dus[(s + HALF) % STAGES].load(READ), WARPS, dtype)
                    ring = _replace(ring, row, (s + HALF) % TAPS, TAPS)
                    acc = _correlate(xs[(s + HALF) % STAGES], ring, acc, s % TAPS, TAPS, WARPS, READ, A, B, dtype)
                    ahead = _row_here(g) * UNROLL + (s + HALF + STAGES - 1)
                    _fetch(
                        xs[(s + HALF + STAGES - 1) % STAGES], dus[(s + HALF + STAGES - 1) % STAGES], x, du, ahead, H, W,
                        pitch, C, HALF,
                    )  # fmt: skip
                ring = _rotate(ring, UNROLL, TAPS)
            async_copy.wait_group(0)
        for t in gl.static_range(STAGES):  # no scratch memory where copies may be pending
            xs[t]._keep_alive()
            dus[t]._keep_alive()

        partial_ptr += (zero64 + split) * TAPS * SLOTS * C
        for ky in gl.static_range(TAPS):
            _store_taps(acc, partial_ptr, c_first, ky, C, TAPS, WARPS, SLOTS)


@functools.cache
def _layouts(warps: int, x_itemsize: int) -> dict[str, object]:
    """As in gluon.py; READ is for half a row of x, or a row of du: see _words for the bits of a pixel's index."""
    x_copy, x_shared = row_layouts(warps, x_itemsize)
    du_copy, du_shared = row_layouts(warps, 2)
    registers = [[0, 1], [0, 2], [8, 0], [16, 0]]
    lanes = [[1, 0], [2, 0], [4, 0], [32, 0], [64, 0]]
    owners = [[0, 4 << i] for i in range(warps.bit_length() - 1)]
    read = gl.DistributedLinearLayout(registers, lanes, owners, [], [128, warps * 4])
    return {"X_COPY": x_copy, "X_SHARED": x_shared, "DU_COPY": du_copy, "DU_SHARED": du_shared, "READ": read}


def supports_wgrad(x: torch.Tensor, du: torch.Tensor) -> bool:
    """Whether this form supports ``x`` and ``du`` (N, H, W, C), as gluon.py's ``supports``."""
    return du.dtype != torch.float32 and supports(x) and supports(du)


def dwconv_wgrad_shape(x: torch.Tensor, taps: int, split: int | None = None) -> tuple[int, ...]:
    """The shape of this form's partial sums, which depends neither on ``du`` nor on autotuning."""
    batch, _, width, channels = x.shape
    split = split or gluon_wgrad_split(tuple(x.shape), target_of(x))
    return cdiv(batch * cdiv(width, 8), split), taps, SLOTS, channels


def dwconv_wgrad_gluon(
    x: torch.Tensor, du: torch.Tensor, taps: int, config: GluonWgradConfig | None = None
) -> torch.Tensor:
    """As ``dwconv_wgrad_partials``, where ``supports_wgrad(x, du)``."""
    batch, height, width, channels = x.shape
    default = config or gluon_wgrad_config(tuple(x.shape), x.element_size(), target_of(x))
    partial = x.new_empty(dwconv_wgrad_shape(x, taps, default.split), dtype=torch.float32)
    tiles = cdiv(width, 8)
    images = 16 // tiles + 2

    def run(config: GluonWgradConfig) -> None:
        launch(
            dwconv_wgrad_gluon_kernel, (cdiv(channels, 4 * config.num_warps) * partial.shape[0],),
            x, du, partial, batch, height, width, tiles, batch * tiles, config.split, cdiv(height, config.unroll),
            C=channels, TAPS=taps, WARPS=config.num_warps, STAGES=config.stages, UNROLL=config.unroll,
            WIDE=images * height * width * channels >= 2**31, SLOTS=SLOTS,
            dtype=gl.bfloat16 if du.dtype == torch.bfloat16 else gl.float16, num_warps=config.num_warps,
            **_layouts(config.num_warps, x.element_size()),
        )  # fmt: skip

    candidates = (config,) if config else gluon_wgrad_candidates(default)
    run(fastest(dwconv_wgrad_gluon_kernel, run, candidates, x, batch, (channels, height, width, taps, du.dtype)))
    return partial
