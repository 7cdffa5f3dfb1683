"""The gradient of a linear layer's weight: a product over all pixels of two row-major matrices.

    out[i, j] (+)= Σ_p left[p, i]·right[p, j]

A tile of out stays in registers for ``CHUNK`` pixels: for each one the vectors of right are loaded and each element of
left is spread over the lanes, as in `gemm`, but nothing has to be packed. Pixels are taken in blocks small enough
for the narrower matrix to stay in the L2 cache; a strip of the wider one, as wide as a tile, is used for all tiles
along the other. The sums of a block's chunks are added up on the stack, those of blocks in out, so that no chain of
additions is long. Threads share the tiles, so the result does not depend on their number.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .gemm import CHUNK, UNROLL
from .llvm_builder import I64, POINTER, Emitter, define
from .machine import Machine
from .work_sharing import PADDING, entry, share

_BLOCK_BYTES, _LEAST_BLOCK = 512 << 10, 512
"""A block's bytes of the narrower matrix, and its least pixels: with fewer, a wide layer's out, which fits no cache, is
read too often."""


class WeightGradSizes(NamedTuple):
    """The kernel for the addresses of left, right and out, the number of pixels, and whether it adds to out, 0 or 1.

    left, right: elements in a row of each, with ``PADDING`` after it.
    """

    left: int
    right: int

    def emit(self, machine: Machine) -> ir.Module:
        """The module."""
        (left, right), module, panel = self, ir.Module(), machine.panel
        last_rows, last_vectors = left % machine.rows, right % panel // machine.lanes
        tiles = {
            rows * 8 + vectors: self._tile(module, machine, rows, vectors)
            for rows in {machine.rows, last_rows} - {0}
            for vectors in {machine.vectors, last_vectors} - {0}
        }
        e, (left_at, right_at, out_at, pixels, adds) = entry(module, machine, 3, 2)
        b, zero = e.builder, e.index(0)
        # Strips of the wider matrix, one after the other, each with all strips of the narrower one.
        strips, by_rows = (-(-left // machine.rows), -(-right // panel)), left > right
        inner = strips[1] if by_rows else strips[0]
        units = share(e, strips[0] * strips[1])
        most = max(_LEAST_BLOCK, _BLOCK_BYTES // (4 * min(left, right)))
        blocks = e.over(e.plus(pixels, most - 1), most)
        block = e.over(e.plus(pixels, e.minus(blocks, 1)), blocks)

        def pixels_from(p: ir.Value) -> None:
            count = e.smaller(e.minus(pixels, p), block)
            fresh = b.zext(b.and_(b.icmp_signed("==", p, zero), b.icmp_signed("==", adds, zero)), I64)

            def tile(unit: ir.Value) -> None:
                pair = e.over(unit, inner), b.urem(unit, e.index(inner))
                i, j = pair if by_rows else pair[::-1]
                row, column = e.times(i, machine.rows), e.times(j, panel)
                given = [
                    e.at(left_at, e.plus(e.times(p, left + PADDING), row)),
                    e.at(right_at, e.plus(e.times(p, right + PADDING), column)),
                    e.at(out_at, e.plus(e.times(row, right), column)),
                    count,
                    fresh,
                ]
                rows = e.choose(e.less(i, left // machine.rows), machine.rows, last_rows)
                vectors = e.choose(e.less(j, right // panel), machine.vectors, last_vectors)
                e.call_one(e.plus(e.times(rows, 8), vectors), tiles, given)

            e.loop(*units, 1, tile)

        e.loop(0, pixels, block, pixels_from)
        b.ret_void()
        return module

    def _tile(self, module: ir.Module, machine: Machine, rows: int, vectors: int) -> ir.Function:
        """``f(left, right, out, count, fresh)``: the products of ``count`` pixels added to a tile, or stored there."""
        ldl, ldr = (size + PADDING for size in self)
        function = define(module, f"tile_{rows}_{vectors}", POINTER, POINTER, POINTER, I64, I64)
        left, right, out, count, fresh = function.args
        e = Emitter(function, machine.lanes)
        b, lanes = e.builder, machine.lanes
        places = [(r, j * lanes) for r in range(rows) for j in range(vectors)]

        def products(p: ir.Value, unroll: int, sums: tuple[ir.Value, ...]) -> list[ir.Value]:
            here = e.at(left, e.times(p, ldl)), e.at(right, e.times(p, ldr))
            for u in range(unroll):
                values = [e.load(here[1], u * ldr + j * lanes) for j in range(vectors)]
                following = []
                for r in range(rows):
                    number = e.spread(e.scalar(here[0], u * ldl + r))
                    following += [e.fma(number, value, sums[len(following) + j]) for j, value in enumerate(values)]
                sums = following
            return sums

        total = e.stack(len(places))
        numbers = [lanes * i for i in range(len(places))]
        for number in numbers:
            e.store(e.spread(0.0), total, number)

        def chunk(start: ir.Value) -> None:
            end = e.smaller(e.plus(start, CHUNK), count)
            whole = e.plus(start, e.times(e.over(e.minus(end, start), UNROLL), UNROLL))
            zeros = [e.spread(0.0)] * len(places)
            sums = e.loop(start, whole, UNROLL, lambda p, *sums: products(p, UNROLL, sums), *zeros)
            sums = e.loop(whole, end, 1, lambda p, *sums: products(p, 1, sums), *sums)
            for number, part in zip(numbers, sums, strict=True):
                e.store(b.fadd(e.load(total, number), part), total, number)

        e.loop(0, count, CHUNK, chunk)
        # Not read if it is fresh: reading a new page before writing it costs a second page fault.
        with b.if_else(b.icmp_signed("!=", fresh, e.index(0))) as (first, later):
            for branch, adds in ((first, False), (later, True)):
                with branch:
                    for (r, column), number in zip(places, numbers, strict=True):
                        place, value = e.at(out, r * self.right + column), e.load(total, number)
                        e.store(b.fadd(e.load(place), value) if adds else value, place)
        b.ret_void()
        return function
