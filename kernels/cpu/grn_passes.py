"""Two passes over the pixels of samples, with the norms of hidden units between them.

    G_k = (Σ_p h²)^½      f_k = 1 + γ_k·G_k/(mean G + ε)

The first pass sums over the pixels of each unit of work (`work_sharing`), which never holds pixels of two samples. Then
the sums of each sample are made. The units are the same for every number of threads, and so are the sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from ..weights import GRN_EPS
from .llvm_builder import F32
from .machine import Machine
from .work_sharing import PADDING, ParallelKernel, share


class GrnPasses(ParallelKernel):
    """A kernel with both passes. The argument h is (N·H·W + a tile's rows, K + ``PADDING``)."""

    def __init__(self, machine: Machine, sizes: Any):
        super().__init__(machine, sizes)
        self.channels, self.hidden = sizes.channels, sizes.hidden
        self.ldh = self.hidden + PADDING
        self.vectors = math.gcd(4, self.hidden // machine.lanes)  # added up side by side

    def first_chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """Emit the first pass, as `ParallelKernel.chunk`."""

    def sample(self, sample: ir.Value) -> None:
        """Emit the work for a sample between the passes."""

    def work(self) -> None:
        """Both passes."""
        samples = self.e.over(self.given["rows"], self.given["height"])
        self.chunks(self.first_chunk)
        self.wait()
        self.e.loop(*share(self.e, samples, *self.place), 1, self.sample)
        self.wait()
        self.chunks(self.chunk)

    def units(self) -> ir.Value:
        """Units of a sample."""
        return self.e.times(self.given["height"], self.given["pieces"])

    def sample_of(self, pixel: ir.Value) -> ir.Value:
        """The sample of a pixel."""
        return self.e.over(pixel, self.e.times(self.given["height"], self.given["width"]))

    def row_of_h(self, pixel: ir.Value) -> ir.Value:
        """The hidden units of a pixel."""
        return self.e.at(self.given["h"], self.e.times(pixel, self.ldh))

    def sums(
        self, rows: ir.Value, ld: int, count: ir.Value, add: Callable[[ir.Value, ir.Value], ir.Value]
    ) -> Sequence[ir.Value]:
        """Sums over ``count`` rows, ``ld`` apart, of ``vectors`` vectors, by ``add(value, sum)``."""
        e = self.e

        def row(r: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            here = e.at(rows, e.times(r, ld))
            return [add(e.load(here, j * e.lanes), total) for j, total in enumerate(sums)]

        return e.loop(0, count, 1, row, *[e.spread(0.0)] * self.vectors)

    def norms(self, squares: ir.Value, ld: int, out: ir.Value) -> ir.Value:
        """Write a sample's G to ``out``, which may be ``squares``, rows ``ld`` apart; returns 1/(mean G + ε)."""
        e, b = self.e, self.e.builder

        def norms(k: ir.Value, total: ir.Value) -> list[ir.Value]:
            for j, square in enumerate(self.sums(e.at(squares, k), ld, self.units(), b.fadd)):
                norm = e.sqrt(square)
                e.store(norm, e.at(out, k), j * e.lanes)
                total = b.fadd(total, norm)
            return [total]

        (total,) = e.loop(0, self.hidden, self.vectors * e.lanes, norms, e.spread(0.0))
        return b.fdiv(e.spread(1.0), b.fadd(self.mean(total), e.spread(GRN_EPS)))

    def mean(self, total: ir.Value) -> ir.Value:
        """The mean over the hidden units, in every lane."""
        e = self.e
        return e.spread(e.builder.fmul(e.sum_of_lanes(total), ir.Constant(F32, 1 / self.hidden)))
