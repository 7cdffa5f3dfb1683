"""A tile of a matrix product that keeps the registers full of sums: rows of A by a panel of packed weights.

    out[r, j] = end(Σ_k a[r, k]·w[j, k] + bias[j])

for ``rows`` rows r and ``vectors``·lanes columns j. Each step k loads the panel's vectors, spreads one a[r, k] over the
lanes for each r, and multiplies each by each: with AVX-512, 28 FMA for 2 vectors and 14 numbers read.

One chain of thousands of additions would err several times as much as BLAS does. So sums of ``CHUNK`` products each are
added up on the stack, for 1 to 3 % of the time.

The weights of a large model come from memory. So while a panel is used the next one is brought into the second level of
cache (2 % faster at one image).

Packed weights (`pack`): (⌈N/panel⌉, K, panel), the last panel as narrow as its columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from llvmlite import ir
from torch import Tensor

from .emit import I64, POINTER, Emitter, define
from .machine import Machine

CHUNK = 96
UNROLL = 4
LINE = 16  # numbers of a cache line

Activation = Callable[[Emitter, ir.Value], ir.Value]


def pack(weight: Tensor, machine: Machine) -> Tensor:
    """w (N, K) as the panels of the formula, one after the other: (N·K,)."""
    whole = len(weight) // machine.panel * machine.panel
    panels = weight[:whole].unflatten(0, (-1, machine.panel)).transpose(1, 2)
    return torch.cat([panels.flatten(), weight[whole:].t().flatten()])


def tile(
    module: ir.Module,
    machine: Machine,
    name: str,
    rows: int,
    vectors: int,
    depth: int,
    act: Activation | None,
    adds: bool,
) -> ir.Function:
    """``f(a, lda, panel, bias, out, ldo, residual, valid)`` for one tile of the product ``name``.

    The tile's end is act(·), or the addition of residual[r, j], laid out as out, or nothing. All rows of a are read,
    but only ``valid`` of them have a residual and a result. lda, ldo: numbers from row to row; depth: K, a multiple of
    ``UNROLL``.
    """
    function = define(module, f"{name}_{rows}_{vectors}", POINTER, I64, POINTER, POINTER, POINTER, I64, POINTER, I64)
    a, lda, panel, bias, out, ldo, residual, valid = function.args
    e = Emitter(function, machine.lanes)
    add, lanes, width = e.builder.fadd, machine.lanes, vectors * machine.lanes
    places = [(r, j) for r in range(rows) for j in range(vectors)]
    total = e.stack(len(places))
    starts = [e.at(a, e.times(lda, r)) for r in range(rows)]

    def sums_from(start: int | ir.Value, count: int) -> list[tuple[int, int, ir.Value]]:
        def step(k: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            here = e.at(panel, e.times(k, width))
            for line in range(0, UNROLL * width, LINE):
                e.prefetch(here, depth * width + line)
            for u in range(UNROLL):
                weights = [e.load(here, u * width + j * lanes) for j in range(vectors)]
                following = []
                for row in starts:  # in this order, which LLVM keeps, one number at a time takes a register
                    number = e.spread(e.scalar(e.at(row, k), u))
                    following += [e.fma(number, weight, sums[len(following) + j]) for j, weight in enumerate(weights)]
                sums = following
            return sums

        zeros = [e.spread(0.0)] * len(places)
        sums = e.loop(start, e.plus(start, count), UNROLL, step, *zeros)
        return [(j * lanes, r * width + j * lanes, s) for (r, j), s in zip(places, sums, strict=True)]

    first = depth % CHUNK or CHUNK
    for column, place, part in sums_from(0, first):
        e.store(add(part, e.load(bias, column)), total, place)

    def another(start: ir.Value) -> None:
        for _, place, part in sums_from(start, CHUNK):
            e.store(add(part, e.load(total, place)), total, place)

    e.loop(first, depth, CHUNK, another)

    def end(r: ir.Value) -> None:
        row, there = e.at(total, e.times(r, width)), e.times(r, ldo)
        for j in range(vectors):
            z = e.load(row, j * lanes)
            z = act(e, z) if act is not None else z
            z = add(e.load(e.at(residual, there), j * lanes), z) if adds else z
            e.store(z, e.at(out, there), j * lanes)

    e.loop(0, e.smaller(valid, rows), 1, end)
    e.builder.ret_void()
    return function
