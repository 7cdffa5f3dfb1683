"""Depthwise convolution of neighbouring pixels of a row.

    u[p, c] = Σ_{ky, kx} w[ky, kx, c]·x[h + ky − k//2, w + p + kx − k//2, c] + bias[c]

The kernel takes one vector of channels at a time. For each row of the filter, its k vectors of weights stay in
registers, and each of the ``GROUP`` + k − 1 pixels is loaded once and multiplied into the up to k sums it belongs to.
``GROUP`` is seven, which divides the widths of the feature maps of a 224² image. No code tests for the image's border:
there is one function for each number of columns missing on the left and on the right.

x: (N, H, W, C); weights: (k·k, C); u: rows of C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from .llvm_builder import I64, POINTER, Emitter, define
from .machine import Machine
from .work_sharing import GROUP, ParallelKernel


def group(
    module: ir.Module, machine: Machine, pixels: int, side: int, channels: int, missing: tuple[int, int]
) -> ir.Function:
    """``f(x, row, first, last, weights, bias, out, ldo)``: u of ``pixels`` pixels.

    x: the first of them; row: elements in an image row; first, last: the filter's rows that lie inside the image;
    ``missing``: columns that lie outside it, left of the pixels and right of them.
    """
    name = "dwconv_{}_{}".format(*missing)
    function = define(module, name, POINTER, I64, I64, I64, POINTER, POINTER, POINTER, I64)
    x, row, first, last, weights, bias, out, ldo = function.args
    e = Emitter(function, machine.lanes)
    pad = side // 2

    def channels_from(c: ir.Value) -> None:
        def filter_row(ky: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            sums = list(sums)
            image_row = e.at(e.at(x, e.times(e.minus(ky, pad), row)), c)
            filter_ = e.at(e.at(weights, e.times(ky, side * channels)), c)
            taps = [e.load(filter_, kx * channels) for kx in range(side)]
            for column in range(missing[0] - pad, pixels + pad - missing[1]):
                value = e.load(image_row, column * channels)
                for p in range(max(0, column - pad), min(pixels, column + pad + 1)):
                    sums[p] = e.fma(value, taps[column - p + pad], sums[p])
            return sums

        sums = e.loop(first, last, 1, filter_row, *[e.spread(0.0)] * pixels)
        for p, u in enumerate(sums):
            e.store(e.builder.fadd(u, e.load(bias, c)), e.at(out, e.times(ldo, p)), c)

    e.loop(0, channels, machine.lanes, channels_from)
    e.builder.ret_void()
    return function


def choose_group(e: Emitter, w: ir.Value, pixels: int, pad: int, width: ir.Value) -> ir.Value:
    """The number of the group for ``pixels`` from column w on: left·(pad + 1) + right, the columns missing there."""
    left, right = e.positive(e.minus(pad, w)), e.positive(e.minus(e.plus(w, pixels + pad), width))
    return e.plus(e.times(left, pad + 1), right)


class Convolving(ParallelKernel):
    """A kernel with a depthwise convolution, with the arguments x, dwconv_weight and dwconv_bias."""

    def __init__(self, machine: Machine, sizes: Any):
        super().__init__(machine, sizes)
        self.channels, self.side, self.pixels = channels, side, pixels = sizes.channels, sizes.side, sizes.group
        self.pad = side // 2
        # A group as wide as the image has all of the padding on both sides.
        ends = range(self.pad + 1) if pixels == GROUP else [self.pad]
        self.groups = {
            left * (self.pad + 1) + right: group(self.module, machine, pixels, side, channels, (left, right))
            for left in ends
            for right in ends
        }

    def convolve(
        self, unit: ir.Value, start: ir.Value, u: ir.Value, ldu: int, then: Callable[[ir.Value], None] | None = None
    ) -> None:
        """u of a unit, in rows ``ldu`` apart, the first of them for pixel ``start``; ``then`` is called on each row."""
        e, pad, channels, pixels = self.e, self.pad, self.channels, self.pixels
        width, height = self.given["width"], self.given["height"]
        row, left = self.row_and_left(unit)
        right = self.right(left)
        h = e.builder.urem(row, height)
        filter_rows = e.positive(e.minus(pad, h)), e.smaller(self.side, e.minus(e.plus(height, pad), h))
        filter_ = self.given["dwconv_weight"], self.given["dwconv_bias"]

        def pixels_from(w: ir.Value) -> None:
            w = e.smaller(w, e.minus(right, pixels))  # the last group may repeat some pixels
            pixel = e.plus(e.times(row, width), w)
            out = e.at(u, e.times(e.minus(pixel, start), ldu))
            here = e.at(self.given["x"], e.times(pixel, channels))
            given = [here, e.times(width, channels), *filter_rows, *filter_, out, e.index(ldu)]
            e.call_one(choose_group(e, w, pixels, pad, width), self.groups, given)
            if then is not None:
                e.loop(0, pixels, 1, lambda p: then(e.at(out, e.times(p, ldu))))

        e.loop(left, right, pixels, pixels_from)


class DwconvSizes(NamedTuple):
    """The kernel for the convolution alone: u is written to y. With the filter flipped it computes x's gradient.

    group: pixels that the convolution does at a time, at most W.
    """

    channels: int
    side: int
    group: int
    addresses = ("x", "y", "dwconv_weight", "dwconv_bias", "scratch")
    row = 0

    @classmethod
    def of(cls, channels: int, side: int, width: int) -> DwconvSizes:
        """For images of this width."""
        return cls(channels, side, min(width, GROUP))


class Dwconv(Convolving, sizes=DwconvSizes):
    """Emits the kernel of `DwconvSizes`."""

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """u of the units from ``first`` up to ``last``."""
        nothing = self.e.index(0)
        self.mine(first, last, lambda unit: self.convolve(unit, nothing, self.given["y"], self.channels))
