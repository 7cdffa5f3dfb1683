"""How threads share the rows of an image, and a matrix product over what one of them holds.

An image row is cut into units, so that a chunk of a wide image is a part of a row, and of a narrow one several rows; a
chunk has about 56 pixels. A kernel without a convolution needs no image rows: its units are one or two tiles of a
product, or half a tile where there are few rows. Threads share the units where there are enough of them, and none waits
for another, but between the passes of a V2 block: a thread that waits for one that another process keeps from running
loses a time slice. Else all work on each chunk together: they share its units, then the columns of each product, with a
barrier between the steps.
Either way an element of the result is computed by the same instructions in the same order, whatever the batch and the
number of threads.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from .gemm import Epilogue, store, tile
from .llvm_builder import I32, I64, POINTER, VOID, Emitter, define
from .machine import Machine

PADDING = 16
"""Numbers between rows in the scratch buffer, so that the rows do not all map to the same sets of the L1 cache."""

ENTRY = "kernel"
"""The function of a module that is run."""
THREAD_FUNCTIONS = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
NUMBERS = ("in_height", "in_width", "rows", "height", "width", "pieces", "unit", "units", "split_columns", "eps")
"""Of every kernel's argument, after its addresses; 64 bits each. in_height, in_width: of x; height, width: of y; rows:
N·height; pieces: units of a row, of ``unit`` pixels, the last may be shorter; units: of a chunk; split_columns: 0 or 1;
eps: a float32's bits."""

GROUP = 7
"""Pixels that a convolution computes at a time. Wider images have no narrower unit: the last group overlaps."""

WIDE_WEIGHT = 1 << 20
"""Elements of a weight that fills much of the last-level cache."""

_CHUNK_PIXELS = 56
_WIDEST_UNIT = 64
_LEAST_PIXELS = 64  # of a thread's own; with fewer, threads share columns
_EVEN = 12  # units of rows: so many are shared evenly enough


def numbers(samples: int, image: tuple[int, int], result: tuple[int, int], eps: float, threads: int) -> dict[str, int]:
    """``NUMBERS`` for heights and widths of x and y."""
    height, width = result
    unit = -(-width // -(-width // _WIDEST_UNIT))
    while 0 < width % unit < GROUP:
        unit -= 1
    pieces = -(-width // unit)
    return {
        "in_height": image[0],
        "in_width": image[1],
        "rows": samples * height,
        "height": height,
        "width": width,
        "pieces": pieces,
        "unit": unit,
        "units": max(1, _CHUNK_PIXELS // unit),
        "split_columns": int(samples * height * width < threads * _LEAST_PIXELS),
        "eps": struct.unpack("I", struct.pack("f", eps))[0],
    }


def unit_of_rows(machine: Machine, rows: int) -> int:
    """Rows of a unit of a kernel without a convolution, for samples of ``rows`` each: two tiles, or less if threads
    could not share such units evenly."""
    tile = machine.rows
    return next((unit for unit in (2 * tile, tile) if rows >= _EVEN * unit), tile // 2)


def units_of_rows(machine: Machine, rows: int) -> int:
    """Units of a sample of ``rows``."""
    return -(-rows // unit_of_rows(machine, rows))


def numbers_of_rows(machine: Machine, samples: int, rows: int, weight: int, eps: float, threads: int) -> dict[str, int]:
    """``NUMBERS`` for a kernel without a convolution, whose weights have ``weight`` elements each.

    Chunks are large where the weights fill the last level of cache, for each chunk reads them once.
    """
    unit = unit_of_rows(machine, rows)
    shares = {
        "unit": unit,
        "pieces": units_of_rows(machine, rows),
        "units": (8 if weight >= WIDE_WEIGHT else 4) * machine.rows // unit,
        "split_columns": int(2 * samples * rows < threads * machine.rows),  # not half a tile for each
    }
    return numbers(samples, (1, rows), (1, rows), eps, threads) | shares


def scratch_rows(machine: Machine, unit: int, units: int) -> int:
    """Rows of scratch memory that a thread needs; the last tile may be larger than what is left of a chunk."""
    return unit * units + machine.rows


def thread_and_threads(e: Emitter) -> tuple[ir.Value, ir.Value]:
    """The number of the thread that runs this, and how many there are."""
    b, module = e.builder, e.builder.module
    names = THREAD_FUNCTIONS[:2]
    functions = (ir.Function(module, ir.FunctionType(I32, []), name) for name in names)
    thread, threads = (b.sext(b.call(function, []), I64) for function in functions)
    return thread, threads


def entry(
    module: ir.Module, machine: Machine, addresses: int, integers: int = 0
) -> tuple[Emitter, tuple[ir.Value, ...]]:
    """Begins ``kernel(argument)``, which every thread runs: also the argument's fields, 64 bits each."""
    function = define(module, ENTRY, POINTER, local=False)
    e = Emitter(function, machine.lanes)
    kinds = [POINTER] * addresses + [I64] * integers
    places = [e.builder.gep(function.args[0], [e.index(i)], source_etype=I64) for i in range(len(kinds))]
    return e, tuple(e.builder.load(place, typ=kind) for place, kind in zip(places, kinds, strict=True))


def share(e: Emitter, work: int | ir.Value, thread: ir.Value | None = None, threads: ir.Value | None = None) -> list:
    """A thread's range, by default this one's, of the pieces of work: the first, and one past the last."""
    if thread is None:
        thread, threads = thread_and_threads(e)
    return [e.over(e.times(work, t), threads) for t in (thread, e.plus(thread, 1))]


class Product(NamedTuple):
    """A matrix product over the rows of a chunk: the fields of its weights, its sizes, its epilogue and its tiles."""

    weight: str
    bias: str
    depth: int
    columns: int
    tiles: dict[tuple[int, int], ir.Function]  # by rows and vectors


class ParallelKernel:
    """Emits the kernel of ``sizes``; subclasses say what is done with a chunk.

    The argument's fields are ``sizes.addresses``, "scratch" among them, and ``NUMBERS``; ``sizes.row``: numbers of a
    row of scratch memory.
    """

    def __init_subclass__(cls, sizes: Any = None) -> None:
        """``sizes``: the class whose ``emit`` gives this kernel's module for a machine."""
        if sizes is not None:
            sizes.emit = lambda self, machine: cls(machine, self).emit()

    def __init__(self, machine: Machine, sizes: Any):
        self.module, self.machine, self.sizes = ir.Module(), machine, sizes

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """Emit the work on the units from ``first`` up to ``last``: ``count`` pixels from ``start`` on."""

    def emit(self) -> ir.Module:
        """The module."""
        self._wait = ir.Function(self.module, ir.FunctionType(VOID, []), THREAD_FUNCTIONS[2])
        addresses = self.sizes.addresses
        e, fields = entry(self.module, self.machine, len(addresses), len(NUMBERS))
        self.e, b = e, e.builder
        self.given = given = dict(zip((*addresses, *NUMBERS), fields, strict=True))
        self.epsilon = b.bitcast(b.trunc(given["eps"], I32), e.vector.element)
        self.place = thread, threads = thread_and_threads(e)
        split = self.split = b.icmp_signed("!=", given["split_columns"], e.index(0))
        self.thread, self.threads = e.choose(split, thread, 0), e.choose(split, threads, 1)
        self.scratch_rows = e.plus(e.times(given["unit"], given["units"]), self.machine.rows)
        size = e.times(self.scratch_rows, self.sizes.row)
        self.scratch = e.at(given["scratch"], e.choose(split, 0, e.times(size, thread)))
        self.work()
        b.ret_void()
        return self.module

    def work(self) -> None:
        """Emit all of the work."""
        self.chunks(self.chunk)

    def chunks(self, chunk: Callable[[ir.Value, ir.Value, ir.Value, ir.Value], None]) -> None:
        """``chunk``, with the arguments of the method of that name, for every chunk of this thread."""
        e, given = self.e, self.given
        everything, units = e.times(given["rows"], given["pieces"]), given["units"]
        first, last = share(e, everything, *self.place)
        first, last = e.choose(self.split, 0, first), e.choose(self.split, everything, last)

        def chunk_from(unit: ir.Value) -> None:
            end, start = e.smaller(e.plus(unit, units), last), self.first_pixel(unit)
            chunk(unit, end, start, e.minus(self.first_pixel(end), start))

        e.loop(first, last, units, chunk_from)

    def wait(self) -> None:
        """Wait for all other threads."""
        self.e.builder.call(self._wait, [])

    def barrier(self) -> None:
        """Wait for the others, where they work on the same chunk."""
        with self.e.builder.if_then(self.split):
            self.wait()

    def mine(self, first: int | ir.Value, last: ir.Value, work: Callable[[ir.Value], None]) -> None:
        """``work(i)`` for this thread's units or rows of a chunk."""
        self.e.loop(self.e.plus(first, self.thread), last, self.threads, work)

    def row_and_left(self, unit: ir.Value) -> tuple[ir.Value, ir.Value]:
        """A unit's image row and first column."""
        e, pieces = self.e, self.given["pieces"]
        return e.over(unit, pieces), e.times(e.builder.urem(unit, pieces), self.given["unit"])

    def right(self, left: ir.Value) -> ir.Value:
        """The column after the last one of the unit whose first one is ``left``."""
        return self.e.smaller(self.e.plus(left, self.given["unit"]), self.given["width"])

    def first_pixel(self, unit: ir.Value) -> ir.Value:
        """The number of a unit's first pixel in the whole result."""
        row, left = self.row_and_left(unit)
        return self.e.plus(self.e.times(row, self.given["width"]), left)

    def rows_of(self, unit: ir.Value, start: ir.Value) -> tuple[ir.Value, ir.Value]:
        """A unit's first row and the one past its last, counted from pixel ``start``."""
        return tuple(self.e.minus(self.first_pixel(u), start) for u in (unit, self.e.plus(unit, 1)))

    def product(
        self, weight: str, bias: str, depth: int, columns: int, end: Epilogue = store, arrays: int = 1
    ) -> Product:
        """A product of ``depth`` by ``columns`` whose epilogue ``end`` accesses ``arrays``."""
        machine = self.machine
        widths = {machine.vectors if columns >= machine.panel else 0, columns % machine.panel // machine.lanes} - {0}
        tiles = {
            (rows, vectors): tile(self.module, machine, weight, rows, vectors, depth, end, arrays)
            for rows in (machine.rows, machine.rows // 2)
            for vectors in widths
        }
        return Product(weight, bias, depth, columns, tiles)

    def multiply(
        self, product: Product, a: ir.Value, count: ir.Value, *arrays: tuple[ir.Value, int], whole: bool = False
    ) -> None:
        """This thread's panels of a product, for ``count`` rows of a, which are ``depth`` + PADDING apart.

        arrays: those of the product's epilogue, each with its row stride. ``whole``: the epilogue also runs for the
        rows of the last tile beyond ``count``, because another product reads them.
        """
        e, machine = self.e, self.machine
        lda, half = product.depth + PADDING, machine.rows // 2
        wide = product.columns // machine.panel
        narrow = product.columns % machine.panel // machine.lanes

        def panel(p: ir.Value) -> None:
            column = e.times(p, machine.panel)
            weight = e.at(self.given[product.weight], e.times(column, product.depth))
            bias = e.at(self.given[product.bias], column)

            def tile_at(r: ir.Value, rows: int, vectors: int) -> None:
                valid = e.index(rows) if whole else e.minus(count, r)
                places = [
                    value
                    for array, ld in arrays
                    for value in (e.at(array, e.plus(e.times(r, ld), column)), e.index(ld))
                ]
                first = e.at(a, e.times(r, lda))
                e.builder.call(product.tiles[rows, vectors], [first, e.index(lda), weight, bias, valid, *places])

            def all_rows(vectors: int) -> None:
                """Whole tiles while more than half of one is left, then half of one."""

                def whole_tile(r: ir.Value, _: ir.Value) -> list[ir.Value]:
                    tile_at(r, machine.rows, vectors)
                    return [e.plus(r, machine.rows)]

                (done,) = e.loop(0, e.minus(count, half), machine.rows, whole_tile, e.index(0))
                with e.builder.if_then(e.less(done, count)):
                    tile_at(done, half, vectors)

            if wide:
                with e.builder.if_then(e.less(p, wide)):
                    all_rows(machine.vectors)
            if narrow:
                with e.builder.if_then(e.less(wide - 1, p)):
                    all_rows(narrow)

        e.loop(*share(e, wide + bool(narrow), self.thread, self.threads), 1, panel)
