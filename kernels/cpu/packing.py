"""Weights that change with every step, packed for `gemm` by all threads.

    transposed:  panel p, element (k, j) = s[p·panel + j]·w[p·panel + j, k]     for z[r, j] = Σ_k a[r, k]·s[j]·w[j, k]
    otherwise:   panel p, element (k, j) = s[k]·w[k, p·panel + j]               for z[r, j] = Σ_k a[r, k]·s[k]·w[k, j]

w: (N, K), transposed, or (K, N); s: a factor for each row of w, or none. All sizes are multiples of the lanes.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .machine import Machine
from .work_sharing import entry, share


class PackSizes(NamedTuple):
    """The kernel for the addresses of w (``rows``, ``columns``), s and the packed weights."""

    rows: int
    columns: int
    transposed: bool
    scaled: bool

    def emit(self, machine: Machine) -> ir.Module:
        """The module."""
        module, lanes = ir.Module(), machine.lanes
        e, (weight, scale, out) = entry(module, machine, 3)
        columns, depth = (self.rows, self.columns) if self.transposed else (self.columns, self.rows)
        wide, narrow = columns // machine.panel, columns % machine.panel // lanes

        def load(row: ir.Value, column: ir.Value) -> ir.Value:
            """s[row]·w[row, column:]."""
            values = e.load(e.at(weight, e.times(row, self.columns)), column)
            return e.builder.fmul(values, e.spread(e.scalar(scale, row))) if self.scaled else values

        def strip(first: ir.Value, place: ir.Value, width: int) -> None:
            """As many columns of a panel as there are lanes."""

            def copy(k: ir.Value) -> None:
                e.store(load(k, first), place, e.times(k, width))

            def square(k: ir.Value) -> None:
                """As many rows of w as there are lanes, as columns."""
                rows = [load(e.plus(first, i), k) for i in range(lanes)]
                for i, vector in enumerate(e.transposed(rows)):
                    e.store(vector, e.at(place, e.times(k, width)), i * width)

            e.loop(0, depth, *((lanes, square) if self.transposed else (1, copy)))

        def panel(p: ir.Value) -> None:
            column = e.times(p, machine.panel)
            start = e.at(out, e.times(column, depth))
            for vectors, mine in ((machine.vectors, e.less(p, wide)), (narrow, e.less(wide - 1, p))):
                if vectors:
                    with e.builder.if_then(mine):
                        for v in range(0, vectors * lanes, lanes):
                            strip(e.plus(column, v), e.at(start, v), vectors * lanes)

        e.loop(*share(e, wide + bool(narrow)), 1, panel)
        e.builder.ret_void()
        return module
