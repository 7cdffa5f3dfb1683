"""Depthwise convolution of pixels side by side.

    u[p, c] = Σ_{ky, kx} w[ky, kx, c]·x[h + ky − k//2, w + p + kx − k//2, c] + bias[c]

One vector of channels at a time: for each row of the filter, its k vectors of weights stay in registers, each of the
``GROUP`` + k − 1 pixels is loaded once and multiplied into the up to k sums it belongs to. ``GROUP`` is seven, which
divides the widths that an image of 224² has. What lies outside the image is not in the code: there is one function for
each number of columns missing on the left and on the right.

x: (N, H, W, C); weights: (k·k, C); u: rows of C.
"""

from __future__ import annotations

from llvmlite import ir

from .emit import I64, POINTER, Emitter, define
from .machine import Machine

GROUP = 7


def group(
    module: ir.Module, machine: Machine, pixels: int, side: int, channels: int, missing: tuple[int, int]
) -> ir.Function:
    """``f(x, row, first, last, weights, bias, out, ldo)``: u of ``pixels`` pixels.

    x: the first of them; row: numbers in an image row; first, last: the filter's rows that lie inside the image;
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

        sums = e.loop(first, last, 1, filter_row, *[e.load(bias, c)] * pixels)
        for p, u in enumerate(sums):
            e.store(u, e.at(out, e.times(ldo, p)), c)

    e.loop(0, channels, machine.lanes, channels_from)
    e.builder.ret_void()
    return function
