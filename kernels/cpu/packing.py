"""Weights that change with every step, packed for `gemm` by all threads.

    transposed:  panel p, number (k, j) = s[p·panel + j]·w[p·panel + j, k]     for z[r, j] = Σ_k a[r, k]·s[j]·w[j, k]
    otherwise:   panel p, number (k, j) = s[k]·w[k, p·panel + j]               for z[r, j] = Σ_k a[r, k]·s[k]·w[k, j]

w: (N, K), transposed, or (K, N); s: a factor for each row of w, or none. Each size is a multiple of the lanes.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .llvm_builder import POINTER
from .machine import Machine
from .work_sharing import entry, share


class PackSizes(NamedTuple):
    """What a kernel is compiled for: the sizes of w, and whether it has factors."""

    rows: int
    columns: int
    transposed: bool
    scaled: bool


class Pack:
    """Emits ``pack(argument)`` for the addresses of w, s and the packed weights."""

    NAME = "pack"

    def __init__(self, machine: Machine, sizes: PackSizes):
        self.machine, self.sizes = machine, sizes

    def emit(self) -> ir.Module:
        """The module."""
        machine, sizes = self.machine, self.sizes
        module = ir.Module(self.NAME)
        e, (self.weight, self.scale, self.out) = entry(module, machine, self.NAME, [POINTER] * 3)
        self.e = e
        columns, self.depth = (sizes.rows, sizes.columns) if sizes.transposed else (sizes.columns, sizes.rows)
        wide, narrow = columns // machine.panel, columns % machine.panel // machine.lanes

        def panel(p: ir.Value) -> None:
            for vectors, mine in ((machine.vectors, e.less(p, wide)), (narrow, e.less(wide - 1, p))):
                if vectors:
                    with e.builder.if_then(mine):
                        self._panel(e.times(p, machine.panel), vectors)

        e.loop(*share(e, wide + bool(narrow)), 1, panel)
        e.builder.ret_void()
        return module

    def _panel(self, column: ir.Value, vectors: int) -> None:
        e, lanes, width = self.e, self.machine.lanes, vectors * self.machine.lanes
        out = e.at(self.out, e.times(column, self.depth))
        for v in range(vectors):
            first = e.plus(column, v * lanes)
            if self.sizes.transposed:
                e.loop(0, self.depth, lanes, lambda k, f=first, v=v: self._square(f, k, e.at(out, v * lanes), width))
            else:
                e.loop(0, self.depth, 1, lambda k, f=first, v=v: self._copy(k, f, e.at(out, v * lanes), width))

    def _copy(self, row: ir.Value, column: ir.Value, out: ir.Value, width: int) -> None:
        self.e.store(self._row(row, column), out, self.e.times(row, width))

    def _square(self, row: ir.Value, column: ir.Value, out: ir.Value, width: int) -> None:
        """As many rows as there are lanes, from one of w on, as columns of a panel."""
        e = self.e
        rows = [self._row(e.plus(row, i), column) for i in range(e.lanes)]
        for i, vector in enumerate(e.transposed(rows)):
            e.store(vector, e.at(out, e.times(column, width)), i * width)

    def _row(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """s[row]·w[row, column:]."""
        e = self.e
        values = e.load(e.at(self.weight, e.times(row, self.sizes.columns)), column)
        return e.builder.fmul(values, e.spread(e.scalar(self.scale, row))) if self.sizes.scaled else values
