"""The gradient of a linear layer's weight: a product over all pixels of two row-major matrices.

    out[i, j] (+)= Σ_p left[p, i]·right[p, j]

A tile of out stays in registers for ``CHUNK`` pixels: for each one the vectors of right are loaded and each number of
left is spread over the lanes, as in `gemm`, but nothing has to be packed. Pixels are taken in blocks small enough
for the narrower matrix to stay in the L2 cache; a strip of the wider one, as wide as a tile, is used for all tiles
along the other. The sums of a block's chunks are added up on the stack, those of blocks in out, so that no chain of
additions is long. Threads share the tiles, so nothing depends on their number.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .gemm import CHUNK, UNROLL
from .llvm_builder import I64, POINTER, Emitter, define
from .machine import Machine
from .work_sharing import PADDING, entry, share

FIELDS = ("left", "right", "out", "pixels", "adds")

_BLOCK_BYTES, _LEAST_BLOCK = 512 << 10, 512
"""Bytes of the narrower matrix, and the least pixels: with fewer, a wide layer's out, which fits no cache, is read too
often."""


class WeightGradSizes(NamedTuple):
    """What a kernel is compiled for: numbers of a row of left and of right, each with ``PADDING`` after it."""

    left: int
    right: int


class WeightGrad:
    """Emits ``weight_grad(argument)`` for ``FIELDS``, 64 bits each; adds: 0 or 1."""

    NAME = "weight_grad"

    def __init__(self, machine: Machine, sizes: WeightGradSizes):
        self.machine, self.sizes = machine, sizes

    def emit(self) -> ir.Module:
        """The module."""
        machine, (left, right) = self.machine, self.sizes
        self.module = module = ir.Module(self.NAME)
        strips = -(-left // machine.rows), -(-right // machine.panel)
        self.tiles = {
            (rows, vectors): self._tile(rows, vectors)
            for rows in {machine.rows, left % machine.rows} - {0}
            for vectors in {machine.vectors, right % machine.panel // machine.lanes} - {0}
        }
        kinds = [POINTER] * 3 + [I64] * (len(FIELDS) - 3)
        e, fields = entry(module, machine, self.NAME, kinds)
        self.given = dict(zip(FIELDS, fields, strict=True))
        self.e, b = e, e.builder
        # Strips of the wider matrix, one after the other, each with all strips of the narrower one.
        by_rows = left > right
        inner = strips[1] if by_rows else strips[0]
        tiles = share(e, strips[0] * strips[1])
        pixels, most = self.given["pixels"], max(_LEAST_BLOCK, _BLOCK_BYTES // (4 * min(left, right)))
        blocks = e.over(e.plus(pixels, most - 1), most)
        block = e.over(e.plus(pixels, e.minus(blocks, 1)), blocks)

        def pixels_from(p: ir.Value) -> None:
            count = e.smaller(e.minus(pixels, p), block)
            fresh = b.and_(b.icmp_signed("==", p, e.index(0)), b.icmp_signed("==", self.given["adds"], e.index(0)))

            def tile(unit: ir.Value) -> None:
                pair = e.over(unit, inner), b.urem(unit, e.index(inner))
                self._run_tile(*(pair if by_rows else pair[::-1]), p, count, b.zext(fresh, I64))

            e.loop(*tiles, 1, tile)

        e.loop(0, pixels, block, pixels_from)
        b.ret_void()
        return module

    def _run_tile(self, i: ir.Value, j: ir.Value, p: ir.Value, count: ir.Value, fresh: ir.Value) -> None:
        e, machine, (left, right) = self.e, self.machine, self.sizes
        row, column = e.times(i, machine.rows), e.times(j, machine.panel)
        given = [
            e.at(self.given["left"], e.plus(e.times(p, left + PADDING), row)),
            e.at(self.given["right"], e.plus(e.times(p, right + PADDING), column)),
            e.at(self.given["out"], e.plus(e.times(row, right), column)),
            count,
            fresh,
        ]
        rows = _sizes(e, i, left // machine.rows, machine.rows, left % machine.rows)
        vectors = _sizes(e, j, right // machine.panel, machine.vectors, right % machine.panel // machine.lanes)
        key = e.plus(e.times(rows, 8), vectors)
        e.cases(
            key,
            {r * 8 + v: lambda function=function: e.builder.call(function, given) for (r, v), function in
             self.tiles.items()},
        )  # fmt: skip

    def _tile(self, rows: int, vectors: int) -> ir.Function:
        """``f(left, right, out, count, fresh)``: the products of ``count`` pixels added to a tile, or stored there."""
        machine, (ldl, ldr) = self.machine, (size + PADDING for size in self.sizes)
        function = define(self.module, f"tile_{rows}_{vectors}", POINTER, POINTER, POINTER, I64, I64)
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
                        place, value = e.at(out, r * self.sizes.right + column), e.load(total, number)
                        e.store(b.fadd(e.load(place), value) if adds else value, place)
        b.ret_void()
        return function


def _sizes(e: Emitter, index: ir.Value, whole: int, size: int, rest: int) -> ir.Value:
    """The size of a strip: ``size`` for the first ``whole``, then ``rest``."""
    return e.choose(e.less(index, whole), size, rest)
