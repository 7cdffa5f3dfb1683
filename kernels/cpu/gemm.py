"""A tile of a matrix product that keeps the registers full of sums: rows of A by a panel of packed weights.

    z[r, j] = Σ_k a[r, k]·w[j, k] + bias[j]

for ``rows`` rows r and ``vectors``·lanes columns j; an `Epilogue` consumes z. Each step k loads the panel's vectors,
broadcasts a[r, k] for each r, and multiplies all pairs: with AVX-512, 28 FMAs for 2 vectors and 14 scalars read.

One chain of thousands of additions would have several times the error of BLAS. So sums of ``CHUNK`` products each are
added up on the stack, which takes 1 to 3 % of the time.

The weights of a large model come from memory. So while a panel is used, the next one is prefetched into the L2 cache (2
% faster at one image).

Packed weights (`pack`): (⌈N/panel⌉, K, panel), the last panel as narrow as its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from llvmlite import ir
from torch import Tensor

from .gelu import gelu
from .llvm_builder import I64, POINTER, Emitter, define
from .machine import Machine

CHUNK = 96
UNROLL = 4
LINE = 16  # float32 in a cache line

Epilogue = Callable[[Emitter, ir.Value, Sequence[ir.Value]], None]
"""The epilogue of a product: emits what is done with a vector of z, given its addresses in the epilogue's arrays."""


def store(e: Emitter, z: ir.Value, places: Sequence[ir.Value]) -> None:
    """out = z."""
    e.store(z, places[0])


def store_gelu(e: Emitter, z: ir.Value, places: Sequence[ir.Value]) -> None:
    """out = GELU(z)."""
    e.store(gelu(e, z), places[0])


def store_sum(e: Emitter, z: ir.Value, places: Sequence[ir.Value]) -> None:
    """out = residual + z, for places in out and in the residual."""
    e.store(e.builder.fadd(e.load(places[1]), z), places[0])


def pack(weight: Tensor, machine: Machine) -> Tensor:
    """w (N, K) as the panels of the formula, one after the other: (N·K,)."""
    whole = len(weight) // machine.panel * machine.panel
    panels = weight[:whole].unflatten(0, (-1, machine.panel)).transpose(1, 2)
    return torch.cat([panels.flatten(), weight[whole:].t().flatten()])


def tile(
    module: ir.Module, machine: Machine, name: str, rows: int, vectors: int, depth: int, end: Epilogue, arrays: int
) -> ir.Function:
    """``f(a, lda, panel, bias, valid, *places)`` for one tile of the product ``name``.

    places: for each of the ``arrays`` of ``end`` the address of its first element and its row stride in elements. All
    rows of a are read, lda apart, but the epilogue runs only for the first ``valid``. depth: K, a multiple of
    ``UNROLL``.
    """
    kinds = POINTER, I64, POINTER, POINTER, I64, *[POINTER, I64] * arrays
    function = define(module, f"{name}_{rows}_{vectors}", *kinds)
    a, lda, panel, bias, valid, *places = function.args
    e = Emitter(function, machine.lanes)
    add, lanes, width = e.builder.fadd, machine.lanes, vectors * machine.lanes
    sums_at = [(r, j) for r in range(rows) for j in range(vectors)]
    total = e.stack(len(sums_at))
    starts = [e.at(a, e.times(lda, r)) for r in range(rows)]

    def sums_from(start: int | ir.Value, count: int) -> list[tuple[int, int, ir.Value]]:
        def step(k: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            here = e.at(panel, e.times(k, width))
            for line in range(0, UNROLL * width, LINE):
                e.prefetch(here, depth * width + line)
            for u in range(UNROLL):
                weights = [e.load(here, u * width + j * lanes) for j in range(vectors)]
                following = []
                for row in starts:  # LLVM keeps this order, in which only one scalar at a time takes a register
                    number = e.spread(e.scalar(e.at(row, k), u))
                    following += [e.fma(number, weight, sums[len(following) + j]) for j, weight in enumerate(weights)]
                sums = following
            return sums

        zeros = [e.spread(0.0)] * len(sums_at)
        sums = e.loop(start, e.plus(start, count), UNROLL, step, *zeros)
        return [(j * lanes, r * width + j * lanes, s) for (r, j), s in zip(sums_at, sums, strict=True)]

    first = depth % CHUNK or CHUNK
    for column, place, part in sums_from(0, first):
        e.store(add(part, e.load(bias, column)), total, place)

    def another(start: ir.Value) -> None:
        for _, place, part in sums_from(start, CHUNK):
            e.store(add(part, e.load(total, place)), total, place)

    e.loop(first, depth, CHUNK, another)

    def row(r: ir.Value) -> None:
        here = [e.at(place, e.times(r, ld)) for place, ld in zip(places[::2], places[1::2], strict=True)]
        for j in range(vectors):
            z = e.load(e.at(total, e.times(r, width)), j * lanes)
            end(e, z, [e.at(place, j * lanes) for place in here])

    e.loop(0, e.smaller(valid, rows), 1, row)
    e.builder.ret_void()
    return function
