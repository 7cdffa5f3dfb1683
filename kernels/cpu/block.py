"""A whole frozen block in one parallel region: nothing but x, y and the weights leaves the caches of a core.

    y = x + w2·GELU(w1·n + b1) + b2,   n = LayerNorm(dwconv(x)) without its affine, which w1 and b1 hold (`folding`)

A chunk goes from convolution to result while its n and its hidden activations h lie in the second level of cache.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .dwconv import GROUP, group
from .gelu import gelu
from .machine import Machine
from .normalising import normalise
from .team import PADDING, Team

ADDRESSES = ("x", "y", "dwconv_weight", "dwconv_bias", "w1", "b1", "w2", "b2", "scratch")
"""x, y: (N, H, W, C); dwconv_weight: (k·k, C); w1, w2: packed (`gemm.pack`)."""


class BlockSizes(NamedTuple):
    """What a kernel is compiled for; ``group``: pixels that the convolution does at a time, at most W."""

    channels: int
    hidden: int
    side: int
    group: int

    @classmethod
    def of(cls, channels: int, hidden: int, side: int, width: int) -> BlockSizes:
        """For images of a width."""
        return cls(channels, hidden, side, min(width, GROUP))

    @property
    def addresses(self) -> tuple[str, ...]:
        """The kernel's arguments that are addresses."""
        return ADDRESSES

    @property
    def row(self) -> int:
        """Numbers of a row of scratch memory: n and h."""
        return self.channels + self.hidden + 2 * PADDING


class Block(Team):
    """Emits ``convnext_block``."""

    NAME = "convnext_block"

    def __init__(self, machine: Machine, sizes: BlockSizes):
        super().__init__(machine, ADDRESSES, sizes.row)
        self.sizes = sizes
        channels, hidden, side, pixels = sizes
        self.pad = side // 2
        # A group as wide as the image has all of the padding on both sides.
        ends = range(self.pad + 1) if pixels == GROUP else [self.pad]
        lost = [(left, right) for left in ends for right in ends]
        self.groups = {missing: group(self.module, machine, pixels, side, channels, missing) for missing in lost}
        self.normalise = normalise(self.module, machine, channels)
        self.fc1 = self.product("w1", "b1", channels, hidden, act=gelu)
        self.fc2 = self.product("w2", "b2", hidden, channels, adds=True)

    def chunk(self, first: ir.Value, last: ir.Value) -> None:
        """y of the units from ``first`` up to ``last``."""
        e, (channels, hidden, *_) = self.e, self.sizes
        start = self.first_pixel(first)
        count = e.minus(self.first_pixel(last), start)
        n, h = self.scratch, e.at(self.scratch, e.times(self.scratch_rows, channels + PADDING))
        x, y = (e.at(self.given[name], e.times(start, channels)) for name in ("x", "y"))
        e.loop(e.plus(first, self.member), last, self.members, lambda unit: self._normalised(unit, start, n))
        self.barrier()
        self.multiply(self.fc1, n, count, h, hidden + PADDING)
        self.barrier()
        self.multiply(self.fc2, h, count, y, channels, residual=x)
        self.barrier()

    def _normalised(self, unit: ir.Value, start: ir.Value, n: ir.Value) -> None:
        """n of a unit, in a chunk from pixel ``start`` on."""
        e, pad, (channels, _, side, pixels) = self.e, self.pad, self.sizes
        width, height, x = self.given["width"], self.given["height"], self.given["x"]
        row, left = self.row_and_left(unit)
        right = self.right(left)
        h = e.builder.urem(row, height)
        filter_rows = e.positive(e.minus(pad, h)), e.smaller(side, e.minus(e.plus(height, pad), h))
        filter_ = self.given["dwconv_weight"], self.given["dwconv_bias"]
        ldn = channels + PADDING

        def pixels_from(w: ir.Value) -> None:
            w = e.smaller(w, e.minus(right, pixels))  # the last group may do some pixels again
            pixel = e.plus(e.times(row, width), w)
            out = e.at(n, e.times(e.minus(pixel, start), ldn))
            here = e.at(x, e.times(pixel, channels))
            given = [here, e.times(width, channels), *filter_rows, *filter_, out, e.index(ldn)]
            missing = e.positive(e.minus(pad, w)), e.positive(e.minus(e.plus(w, pixels + pad), width))
            e.cases(
                e.plus(e.times(missing[0], pad + 1), missing[1]),
                {
                    left * (pad + 1) + right: lambda function=function: e.builder.call(function, given)
                    for (left, right), function in self.groups.items()
                },
            )

            def normalise_in_place(p: ir.Value) -> None:
                u = e.at(out, e.times(p, ldn))
                e.builder.call(self.normalise, [u, u, self.epsilon])

            e.loop(0, pixels, 1, normalise_in_place)

        e.loop(left, right, pixels, pixels_from)
