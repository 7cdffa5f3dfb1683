"""The convolutions of patches that do not overlap, as a matrix product over gathered patches.

    downsampling:  y[p] = Σ_q w[q]·x̂[patch p, pixel q] + bias
    stem:          y[p] = LayerNorm(Σ_q w[q]·image[patch p, element q] + bias)

x̂ = LayerNorm(x) without its affine, which w and bias hold (`folding`).

A chunk's patches stay in the L2 cache, one per row, in the order of the packed weights: (kh, kw, C) for downsampling,
(C, kh, kw) for the stem. Pixels at the right and the bottom that fill no patch are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from .layernorm import normalise
from .machine import Machine
from .work_sharing import PADDING, ParallelKernel

Work = Callable[[ir.Value, ir.Value, ir.Value, ir.Value], None]


class PatchSizes(NamedTuple):
    """The kernel for C, C', kh and kw, of a stem or of downsampling.

    x: (N, H, W, C), the stem's (N, C, H, W); y: (N, H', W', C'); weight: packed (`gemm.pack`); ln_weight, ln_bias: the
    stem's.
    """

    channels: int
    out_channels: int
    height: int
    width: int
    stem: bool
    addresses = ("x", "y", "weight", "bias", "ln_weight", "ln_bias", "scratch")

    @property
    def depth(self) -> int:
        """Elements in a patch."""
        return self.channels * self.height * self.width

    @property
    def row(self) -> int:
        """Elements in a row of scratch memory: a patch."""
        return self.depth + PADDING


class Patches(ParallelKernel, sizes=PatchSizes):
    """Emits the kernel of `PatchSizes`."""

    def __init__(self, machine: Machine, sizes: PatchSizes):
        super().__init__(machine, sizes)
        normed = sizes.out_channels if sizes.stem else sizes.channels
        self.normalise = normalise(self.module, machine, normed, affine=sizes.stem)
        self.linear = self.product("weight", "bias", sizes.depth, sizes.out_channels)

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """y of the units from ``first`` up to ``last``."""
        e, columns = self.e, self.sizes.out_channels
        y = e.at(self.given["y"], e.times(start, columns))

        def of_units(work: Work) -> None:
            self.mine(first, last, lambda unit: self._pixels(unit, start, work))

        of_units(self._gather_numbers if self.sizes.stem else self._gather_pixels)
        self.barrier()
        self.multiply(self.linear, self.scratch, count, (y, columns))
        self.barrier()
        if self.sizes.stem:
            of_units(lambda _, __, ___, place: self._normalise(e.at(y, e.times(place, columns))))
            self.barrier()

    def _pixels(self, unit: ir.Value, start: ir.Value, work: Work) -> None:
        """``work(sample, row, column, place)`` for the pixels of a unit; place: a pixel's in the chunk."""
        e, height, width = self.e, self.given["height"], self.given["width"]
        row, left = self.row_and_left(unit)
        sample, h = e.over(row, height), e.builder.urem(row, height)
        before = e.minus(e.times(row, width), start)
        e.loop(left, self.right(left), 1, lambda w: work(sample, h, w, e.plus(before, w)))

    def _normalise(self, row: ir.Value) -> None:
        """The stem's LayerNorm of a row of y."""
        affine = self.given["ln_weight"], self.given["ln_bias"]
        self.e.builder.call(self.normalise, [row, row, self.epsilon, *affine])

    def _gather_pixels(self, sample: ir.Value, h: ir.Value, w: ir.Value, place: ir.Value) -> None:
        e, (channels, _, kh, kw, _) = self.e, self.sizes
        height, width = self.given["in_height"], self.given["in_width"]
        patch = e.at(self.scratch, e.times(place, self.sizes.row))
        for i in range(kh):
            row = e.plus(e.times(sample, height), e.plus(e.times(h, kh), i))
            pixel = e.plus(e.times(row, width), e.times(w, kw))
            for j in range(kw):
                x = e.at(self.given["x"], e.times(e.plus(pixel, j), channels))
                e.builder.call(self.normalise, [x, e.at(patch, (i * kw + j) * channels), self.epsilon])

    def _gather_numbers(self, sample: ir.Value, h: ir.Value, w: ir.Value, place: ir.Value) -> None:
        e, (channels, _, kh, kw, _) = self.e, self.sizes
        height, width = self.given["in_height"], self.given["in_width"]
        patch = e.at(self.scratch, e.times(place, self.sizes.row))
        for c in range(channels):
            plane = e.plus(e.times(sample, channels), c)
            for i in range(kh):
                row = e.plus(e.times(plane, height), e.plus(e.times(h, kh), i))
                x = e.at(self.given["x"], e.plus(e.times(row, width), e.times(w, kw)))
                for j in range(kw):
                    e.builder.store(e.scalar(x, j), e.at(patch, (c * kh + i) * kw + j), align=4)
