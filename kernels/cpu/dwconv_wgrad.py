"""The weight gradient of the depthwise convolution.

    dw[ky, kx, c] = Σ_{n, h, w} du[n, h, w, c]·x[n, h + ky − k//2, w + kx − k//2, c]

A thread's work is one row of the filter for one vector of channels: k sums. Of each group of pixels side by side du and
x are loaded once, 20 vectors for 49 products. The sums of a group are added to those of an image row, these to those of
the sample, and these to dw, so that no chain of additions is long. Nothing depends on the number of threads.

x, du: (N, H, W, C); dw: (k·k, C).
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .llvm_builder import I64, POINTER, Emitter, define
from .machine import Machine
from .work_sharing import GROUP, entry, share

FIELDS = ("x", "du", "dw", "samples", "height", "width")


class WgradSizes(NamedTuple):
    """What a kernel is compiled for: C and k."""

    channels: int
    side: int


def group(module: ir.Module, machine: Machine, pixels: int, sizes: WgradSizes, missing: tuple[int, int]) -> ir.Function:
    """``f(x, du, sums)``: a group's products added to the k sums of an image row; see `dwconv.group`."""
    channels, side = sizes
    function = define(module, "wgrad_{}_{}_{}".format(pixels, *missing), POINTER, POINTER, POINTER)
    x, du, total = function.args
    e = Emitter(function, machine.lanes)
    pad = side // 2
    gradients = [e.load(du, p * channels) for p in range(pixels)]
    sums: list[ir.Value | None] = [None] * side
    for column in range(missing[0] - pad, pixels + pad - missing[1]):
        value = e.load(x, column * channels)
        for p in range(max(0, column - pad), min(pixels, column + pad + 1)):
            kx = column - p + pad
            first = sums[kx] is None
            sums[kx] = e.builder.fmul(value, gradients[p]) if first else e.fma(value, gradients[p], sums[kx])
    for kx, part in enumerate(sums):
        if part is not None:
            e.store(e.builder.fadd(e.load(total, kx * machine.lanes), part), total, kx * machine.lanes)
    e.builder.ret_void()
    return function


class DwconvWgrad:
    """Emits ``dwconv_wgrad(argument)`` for ``FIELDS``, 64 bits each."""

    NAME = "dwconv_wgrad"

    def __init__(self, machine: Machine, sizes: WgradSizes):
        self.machine, self.sizes = machine, sizes

    def emit(self) -> ir.Module:
        """The module."""
        machine, (channels, side) = self.machine, self.sizes
        module = ir.Module(self.NAME)
        self.pad = side // 2
        ends = range(self.pad + 1)
        self.groups = {
            pixels: {(left, right): group(module, machine, pixels, self.sizes, (left, right))
                     for left in ends for right in ends}
            for pixels in (GROUP, 1)
        }  # fmt: skip
        kinds = [POINTER] * 3 + [I64] * (len(FIELDS) - 3)
        e, fields = entry(module, machine, self.NAME, kinds)
        self.given = dict(zip(FIELDS, fields, strict=True))
        self.e, b = e, e.builder
        self.levels = [e.stack(side) for _ in range(3)]
        work = side * (channels // machine.lanes)
        e.loop(*share(e, work), 1, lambda unit: self._filter_row(b.urem(unit, e.index(side)), e.over(unit, side)))
        b.ret_void()
        return module

    def _clear(self, level: int) -> None:
        for kx in range(self.sizes.side):
            self.e.store(self.e.spread(0.0), self.levels[level], kx * self.machine.lanes)

    def _add_up(self, level: int) -> None:
        """The sums of a level added to those of the next."""
        e, (small, large) = self.e, self.levels[level : level + 2]
        for place in range(0, self.sizes.side * self.machine.lanes, self.machine.lanes):
            e.store(e.builder.fadd(e.load(large, place), e.load(small, place)), large, place)

    def _filter_row(self, ky: ir.Value, vector: ir.Value) -> None:
        e, pad, lanes, (channels, side) = self.e, self.pad, self.machine.lanes, self.sizes
        height, width = self.given["height"], self.given["width"]
        c = e.times(vector, lanes)
        first = e.positive(e.minus(pad, ky))
        last = e.smaller(height, e.minus(e.plus(height, pad), ky))
        self._clear(2)

        def sample(n: ir.Value) -> None:
            self._clear(1)

            def row(h: ir.Value) -> None:
                self._clear(0)
                start = e.times(e.plus(e.times(n, height), h), width)
                shifted = e.plus(start, e.times(e.minus(ky, pad), width))
                du, x = (
                    e.at(self.given[name], e.plus(e.times(pixel, channels), c))
                    for name, pixel in (("du", start), ("x", shifted))
                )
                whole = e.times(e.over(width, GROUP), GROUP)
                for pixels, begin, end in ((GROUP, 0, whole), (1, whole, width)):
                    e.loop(begin, end, pixels, lambda w, pixels=pixels: self._group(pixels, w, x, du))
                self._add_up(0)

            e.loop(first, last, 1, row)
            self._add_up(1)

        e.loop(0, self.given["samples"], 1, sample)
        for kx in range(side):
            place = e.plus(e.times(e.plus(e.times(ky, side), kx), channels), c)
            e.store(e.load(self.levels[2], kx * lanes), self.given["dw"], place)

    def _group(self, pixels: int, w: ir.Value, x: ir.Value, du: ir.Value) -> None:
        e, pad, place = self.e, self.pad, self.e.times(w, self.sizes.channels)
        given = [e.at(x, place), e.at(du, place), self.levels[0]]
        missing = e.positive(e.minus(pad, w)), e.positive(e.minus(e.plus(w, pixels + pad), self.given["width"]))
        e.cases(
            e.plus(e.times(missing[0], pad + 1), missing[1]),
            {
                left * (pad + 1) + right: lambda function=function: e.builder.call(function, given)
                for (left, right), function in self.groups[pixels].items()
            },
        )
