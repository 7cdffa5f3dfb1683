"""A frozen ConvNeXt V2 block in one parallel region, in two passes: its global response norm is over all pixels of a
sample.

    h = GELU(w1·n + b1),   n = LayerNorm(dwconv(x)) without its affine, which w1 and b1 hold (`folding`)
    G_k = (Σ_p h²)^½      f_k = 1 + γ_k·G_k/(mean G + ε)      y = x + w2·(h∘f) + b2

The first pass leaves h, and Σ h² of each unit (`work_sharing`). Then f of each sample follows. The second pass writes
h∘f in the place of h, and y. The units are the same for every number of threads, and so are the sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from llvmlite import ir

from ..weights import GRN_EPS
from .dwconv import Convolving
from .frozen_block import BlockSizes
from .gemm import store_gelu, store_sum
from .layernorm import normalise
from .llvm_builder import F32
from .machine import Machine
from .work_sharing import PADDING, share


class GrnBlockSizes(BlockSizes):
    """The kernel for a block, as `BlockSizes`; gamma: (K,).

    Two buffers of its own: h (N·H·W and a tile's rows, K + ``PADDING``), and squares (units, K), in which f of a sample
    takes the place of its first unit.
    """

    addresses = (*BlockSizes.addresses[:-1], "gamma", "h", "squares", "scratch")

    @property
    def row(self) -> int:
        """Numbers of a row of scratch memory: n."""
        return self.channels + PADDING

    def emit(self, machine: Machine) -> ir.Module:
        """The module."""
        return GrnBlock(machine, self).emit()


class GrnBlock(Convolving):
    """Emits the kernel of `GrnBlockSizes`."""

    def __init__(self, machine: Machine, sizes: GrnBlockSizes):
        super().__init__(machine, sizes)
        channels, self.hidden, *_ = sizes
        self.ldh = self.hidden + PADDING
        self.vectors = math.gcd(4, self.hidden // machine.lanes)  # that are added up side by side
        self.normalise = normalise(self.module, machine, channels)
        self.fc1 = self.product("w1", "b1", channels, self.hidden, store_gelu)
        self.fc2 = self.product("w2", "b2", self.hidden, channels, store_sum, arrays=2)

    def work(self) -> None:
        """Both passes, and f between them."""
        samples = self.e.over(self.given["rows"], self.given["height"])
        self.chunks(self._hidden_chunk)
        self.wait()
        self.e.loop(*share(self.e, samples, *self.place), 1, self._factors)
        self.wait()
        self.chunks(self._output_chunk)

    def _hidden_chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """h of the units from ``first`` up to ``last``, and Σ h² of each."""
        e, n = self.e, self.scratch

        def normalise_in_place(u: ir.Value) -> None:
            e.builder.call(self.normalise, [u, u, self.epsilon])

        self.mine(first, last, lambda unit: self.convolve(unit, start, n, self.sizes.row, normalise_in_place))
        self.barrier()
        self.multiply(self.fc1, n, count, (self._row_of_h(start), self.ldh))
        self.barrier()
        self.mine(first, last, self._add_squares)
        self.barrier()

    def _row_of_h(self, pixel: ir.Value) -> ir.Value:
        return self.e.at(self.given["h"], self.e.times(pixel, self.ldh))

    def _sums(
        self, rows: ir.Value, ld: int, count: ir.Value, add: Callable[[ir.Value, ir.Value], ir.Value]
    ) -> Sequence[ir.Value]:
        """Sums over ``count`` rows, ``ld`` apart, of ``vectors`` vectors, by ``add(value, sum)``."""
        e = self.e

        def row(r: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            here = e.at(rows, e.times(r, ld))
            return [add(e.load(here, j * e.lanes), total) for j, total in enumerate(sums)]

        return e.loop(0, count, 1, row, *[e.spread(0.0)] * self.vectors)

    def _add_squares(self, unit: ir.Value) -> None:
        e, start = self.e, self.first_pixel(unit)
        count = e.minus(self.first_pixel(e.plus(unit, 1)), start)
        h, out = self._row_of_h(start), e.at(self.given["squares"], e.times(unit, self.hidden))

        def columns(k: ir.Value) -> None:
            for j, total in enumerate(self._sums(e.at(h, k), self.ldh, count, lambda v, total: e.fma(v, v, total))):
                e.store(total, e.at(out, k), j * e.lanes)

        e.loop(0, self.hidden, self.vectors * e.lanes, columns)

    def _factors(self, sample: ir.Value) -> None:
        e, b, hidden = self.e, self.e.builder, self.hidden
        units = e.times(self.given["height"], self.given["pieces"])
        squares = e.at(self.given["squares"], e.times(e.times(sample, units), hidden))

        def norms(k: ir.Value, total: ir.Value) -> list[ir.Value]:
            here = e.at(squares, k)
            for j, square in enumerate(self._sums(here, hidden, units, b.fadd)):
                norm = e.sqrt(square)
                e.store(norm, here, j * e.lanes)
                total = b.fadd(total, norm)
            return [total]

        (total,) = e.loop(0, hidden, self.vectors * e.lanes, norms, e.spread(0.0))
        mean = b.fmul(e.sum_of_lanes(total), ir.Constant(F32, 1 / hidden))
        mean = b.fadd(mean, ir.Constant(F32, GRN_EPS))
        inverse = b.fdiv(e.spread(1.0), e.spread(mean))

        def factor(k: ir.Value) -> None:
            relative = b.fmul(e.load(squares, k), inverse)
            e.store(e.fma(e.load(self.given["gamma"], k), relative, e.spread(1.0)), squares, k)

        e.loop(0, hidden, e.lanes, factor)

    def _output_chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """y of the units from ``first`` up to ``last``."""
        e, given, channels = self.e, self.given, self.channels
        units = e.times(given["height"], given["pieces"])
        x, y = (e.at(given[name], e.times(start, channels)) for name in ("x", "y"))

        def scale_unit(unit: ir.Value) -> None:
            factors = e.at(given["squares"], e.times(e.times(e.over(unit, units), units), self.hidden))

            def scale_row(pixel: ir.Value) -> None:
                row = self._row_of_h(pixel)
                e.loop(
                    *(0, self.hidden, e.lanes),
                    lambda k: e.store(e.builder.fmul(e.load(row, k), e.load(factors, k)), row, k),
                )

            e.loop(self.first_pixel(unit), self.first_pixel(e.plus(unit, 1)), 1, scale_row)

        self.mine(first, last, scale_unit)
        self.barrier()
        self.multiply(self.fc2, self._row_of_h(start), count, (y, channels), (x, channels))
        self.barrier()
