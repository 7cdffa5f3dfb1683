"""A frozen ConvNeXt V2 block in two parallel regions, for its global response norm is over all pixels of a sample.

    h = GELU(w1·n + b1),   n = LayerNorm(dwconv(x)) without its affine, which w1 and b1 hold (`folding`)
    y = x + w2·(h∘f) + b2, f: the factor of each hidden unit of a sample, from the norms of h

n and h∘f of a chunk stay in the L2 cache. The first region also leaves Σ h² of each unit (`work_sharing`), to be added
up for the norms; the units are the same for every number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .dwconv import Convolving
from .gemm import store_gelu, store_sum
from .layernorm import normalise
from .machine import Machine
from .work_sharing import GROUP, PADDING, ParallelKernel


class GrnHiddenSizes(NamedTuple):
    """The kernel for h (N, H, W, K) and squares (units, K), the rest as of `frozen_block.BlockSizes`."""

    channels: int
    hidden: int
    side: int
    group: int
    addresses = ("x", "h", "squares", "dwconv_weight", "dwconv_bias", "w1", "b1", "scratch")

    @classmethod
    def of(cls, channels: int, hidden: int, side: int, width: int) -> GrnHiddenSizes:
        """For images of a width."""
        return cls(channels, hidden, side, min(width, GROUP))

    @property
    def row(self) -> int:
        """Numbers of a row of scratch memory: n."""
        return self.channels + PADDING

    def emit(self, machine: Machine) -> ir.Module:
        """The module."""
        return GrnHidden(machine, self).emit()


class GrnHidden(Convolving):
    """Emits the kernel of `GrnHiddenSizes`."""

    def __init__(self, machine: Machine, sizes: GrnHiddenSizes):
        super().__init__(machine, sizes)
        self.normalise = normalise(self.module, machine, sizes.channels)
        self.fc1 = self.product("w1", "b1", sizes.channels, sizes.hidden, store_gelu)

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """h of the units from ``first`` up to ``last``."""
        e, n, hidden = self.e, self.scratch, self.sizes.hidden

        def normalise_in_place(u: ir.Value) -> None:
            e.builder.call(self.normalise, [u, u, self.epsilon])

        self.mine(first, last, lambda unit: self.convolve(unit, start, n, self.sizes.row, normalise_in_place))
        self.barrier()
        self.multiply(self.fc1, n, count, (e.at(self.given["h"], e.times(start, hidden)), hidden))
        self.barrier()
        self.mine(first, last, self._add_squares)
        self.barrier()

    def _add_squares(self, unit: ir.Value) -> None:
        """Σ h² over the pixels of a unit."""
        e, given, hidden = self.e, self.given, self.sizes.hidden
        start, end = self.first_pixel(unit), self.first_pixel(e.plus(unit, 1))
        out = e.at(given["squares"], e.times(unit, hidden))

        def vector(k: ir.Value) -> None:
            column = e.at(given["h"], k)

            def add(pixel: ir.Value, total: ir.Value) -> list[ir.Value]:
                value = e.load(column, e.times(pixel, hidden))
                return [e.fma(value, value, total)]

            e.store(*e.loop(start, end, 1, add, e.spread(0.0)), out, k)

        e.loop(0, hidden, e.lanes, vector)


class GrnOutputSizes(NamedTuple):
    """The kernel for h (N, H, W, K), factors (N, K), x and y (N, H, W, C), w2 packed (`gemm.pack`)."""

    channels: int
    hidden: int
    addresses = ("h", "y", "factors", "x", "w2", "b2", "scratch")

    @property
    def row(self) -> int:
        """Numbers of a row of scratch memory: h∘f."""
        return self.hidden + PADDING

    def emit(self, machine: Machine) -> ir.Module:
        """The module."""
        return GrnOutput(machine, self).emit()


class GrnOutput(ParallelKernel):
    """Emits the kernel of `GrnOutputSizes`."""

    def __init__(self, machine: Machine, sizes: GrnOutputSizes):
        super().__init__(machine, sizes)
        self.fc2 = self.product("w2", "b2", sizes.hidden, sizes.channels, store_sum, arrays=2)

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """y of the units from ``first`` up to ``last``."""
        e, given, (channels, hidden) = self.e, self.given, self.sizes
        pixels = e.times(given["height"], given["width"])
        x, y = (e.at(given[name], e.times(start, channels)) for name in ("x", "y"))

        def scale_row(r: ir.Value) -> None:
            pixel = e.plus(start, r)
            factors = e.at(given["factors"], e.times(e.over(pixel, pixels), hidden))
            row, out = e.at(given["h"], e.times(pixel, hidden)), e.at(self.scratch, e.times(r, self.sizes.row))
            e.loop(0, hidden, e.lanes, lambda k: e.store(e.builder.fmul(e.load(row, k), e.load(factors, k)), out, k))

        self.mine(0, count, scale_row)
        self.barrier()
        self.multiply(self.fc2, self.scratch, count, (y, channels), (x, channels))
        self.barrier()
