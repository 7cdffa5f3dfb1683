"""The weight gradient of the depthwise convolution.

    dw[ky, kx, c] = Σ_{n, h, w} du[n, h, w, c]·x[n, h + ky − k//2, w + kx − k//2, c]

A thread computes one row of the filter for one vector of channels: k sums. For each group of neighbouring pixels, du
and x are loaded once, 20 vectors for 49 products. The sums of a group are added to those of its image row, these to
those of the sample, and these to dw, so that no chain of additions is long. The result does not depend on the number of
threads.

x, du: (N, H, W, C); dw: (k·k, C).
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .dwconv import choose_group
from .llvm_builder import POINTER, Emitter, define
from .machine import Machine
from .work_sharing import GROUP, entry, share


class WgradSizes(NamedTuple):
    """The kernel for the addresses of x, du and dw, N, H and W."""

    channels: int
    side: int

    def emit(self, machine: Machine) -> ir.Module:
        """The module."""
        (channels, side), pad, lanes = self, self.side // 2, machine.lanes
        module = ir.Module()
        groups = {
            pixels: {
                left * (pad + 1) + right: group(module, machine, pixels, self, (left, right))
                for left in range(pad + 1)
                for right in range(pad + 1)
            }
            for pixels in (GROUP, 1)
        }
        e, (x, du, dw, samples, height, width) = entry(module, machine, 3, 3)
        of_group, of_row, of_sample = (e.stack(side) for _ in range(3))
        places = range(0, side * lanes, lanes)

        def clear(sums: ir.Value) -> None:
            for place in places:
                e.store(e.spread(0.0), sums, place)

        def add_up(small: ir.Value, large: ir.Value) -> None:
            for place in places:
                e.store(e.builder.fadd(e.load(large, place), e.load(small, place)), large, place)

        def filter_row(unit: ir.Value) -> None:
            ky, c = e.builder.urem(unit, e.index(side)), e.times(e.over(unit, side), lanes)
            clear(of_sample)

            def sample(n: ir.Value) -> None:
                clear(of_row)

                def row(h: ir.Value) -> None:
                    clear(of_group)
                    start = e.times(e.plus(e.times(n, height), h), width)
                    shifted = e.plus(start, e.times(e.minus(ky, pad), width))
                    here = [
                        e.at(array, e.plus(e.times(pixel, channels), c)) for array, pixel in ((x, shifted), (du, start))
                    ]
                    whole = e.times(e.over(width, GROUP), GROUP)
                    for pixels, begin, end in ((GROUP, 0, whole), (1, whole, width)):

                        def pixels_from(w: ir.Value, pixels: int = pixels) -> None:
                            given = [*(e.at(array, e.times(w, channels)) for array in here), of_group]
                            e.call_one(choose_group(e, w, pixels, pad, width), groups[pixels], given)

                        e.loop(begin, end, pixels, pixels_from)
                    add_up(of_group, of_row)

                last = e.smaller(height, e.minus(e.plus(height, pad), ky))
                e.loop(e.positive(e.minus(pad, ky)), last, 1, row)
                add_up(of_row, of_sample)

            e.loop(0, samples, 1, sample)
            for kx, place in enumerate(places):
                tap = e.plus(e.times(ky, side), kx)
                e.store(e.load(of_sample, place), dw, e.plus(e.times(tap, channels), c))

        e.loop(*share(e, side * (channels // lanes)), 1, filter_row)
        e.builder.ret_void()
        return module


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
