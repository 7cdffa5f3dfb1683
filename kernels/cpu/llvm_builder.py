"""Helpers on top of llvmlite's IR builder: loops, branches, float32 vectors and pointers to them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

from llvmlite import ir

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
POINTER, VOID = ir.PointerType(), ir.VoidType()


def define(module: ir.Module, name: str, *arguments: ir.Type, local: bool = True) -> ir.Function:
    """A new function without a result; ``local``: called from its own module alone."""
    function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
    if local:
        function.linkage = "internal"
    function.attributes.add("nounwind")
    return function


class Emitter:
    """Emits the body of one function that works on vectors of ``lanes`` float32. Indices are 64-bit integers."""

    def __init__(self, function: ir.Function, lanes: int):
        self.lanes = lanes
        self.vector = ir.VectorType(F32, lanes)
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))

    def loop(
        self,
        start: int | ir.Value,
        stop: int | ir.Value,
        step: int | ir.Value,
        body: Callable[..., Sequence[ir.Value] | None],
        *carried: ir.Value,
    ) -> Sequence[ir.Value]:
        """``for i in range(start, stop, step): carried = body(i, *carried)``; returns the last ``carried``."""
        b = self.builder
        start, stop, step = map(self.index, (start, stop, step))
        before, head = b.block, b.append_basic_block("head")
        inside, after = b.append_basic_block("body"), b.append_basic_block("after")
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        values = [b.phi(value.type) for value in carried]
        b.cbranch(b.icmp_signed("<", i, stop), inside, after)
        b.position_at_end(inside)
        results = body(i, *values) or ()
        for phi, first, last in zip([i, *values], [start, *carried], [b.add(i, step), *results], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(last, b.block)
        b.branch(head)
        b.position_at_end(after)
        return values

    def call_one(self, key: ir.Value, functions: Mapping[int, ir.Function], arguments: Sequence[ir.Value]) -> None:
        """Call ``functions[key]``, if there is one."""
        b = self.builder
        after = b.append_basic_block("after")
        switch = b.switch(key, after)
        for number, function in functions.items():
            block = b.append_basic_block("case")
            switch.add_case(self.index(number), block)
            b.position_at_end(block)
            b.call(function, arguments)
            b.branch(after)
        b.position_at_end(after)

    def index(self, value: int | ir.Value) -> ir.Value:
        """An index as a value."""
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def times(self, x: int | ir.Value, y: int | ir.Value) -> ir.Value:
        """x·y of indices."""
        return self.builder.mul(self.index(x), self.index(y))

    def plus(self, x: int | ir.Value, y: int | ir.Value) -> ir.Value:
        """x + y of indices."""
        return self.builder.add(self.index(x), self.index(y))

    def minus(self, x: int | ir.Value, y: int | ir.Value) -> ir.Value:
        """x − y of indices."""
        return self.builder.sub(self.index(x), self.index(y))

    def over(self, x: int | ir.Value, y: int | ir.Value) -> ir.Value:
        """⌊x/y⌋ of indices that are not negative."""
        return self.builder.udiv(self.index(x), self.index(y))

    def smaller(self, x: int | ir.Value, y: int | ir.Value) -> ir.Value:
        """min(x, y) of indices."""
        return self.choose(self.less(x, y), x, y)

    def positive(self, x: ir.Value) -> ir.Value:
        """max(x, 0) of an index."""
        return self.choose(self.less(x, 0), 0, x)

    def less(self, x: int | ir.Value, y: int | ir.Value) -> ir.Value:
        """x < y of indices."""
        return self.builder.icmp_signed("<", self.index(x), self.index(y))

    def choose(self, condition: ir.Value, yes: int | ir.Value, no: int | ir.Value) -> ir.Value:
        """One of two indices."""
        return self.builder.select(condition, self.index(yes), self.index(no))

    def at(self, pointer: ir.Value, index: int | ir.Value) -> ir.Value:
        """&pointer[index] for float32."""
        return self.builder.gep(pointer, [self.index(index)], inbounds=True, source_etype=F32)

    def stack(self, vectors: int) -> ir.Value:
        """Stack memory for vectors, until the function returns."""
        room = self.builder.alloca(ir.ArrayType(self.vector, vectors))
        room.align = 64
        # llvmlite gives it a typed pointer, and has no cast from that to an opaque pointer.
        return self.builder.inttoptr(self.builder.ptrtoint(room, I64), POINTER)

    def load(self, pointer: ir.Value, index: int | ir.Value = 0) -> ir.Value:
        """The vector from pointer[index] on."""
        return self.builder.load(self.at(pointer, index), align=4, typ=self.vector)

    def store(self, value: ir.Value, pointer: ir.Value, index: int | ir.Value = 0) -> None:
        """Store a vector at pointer[index]."""
        self.builder.store(value, self.at(pointer, index), align=4)

    def prefetch(self, pointer: ir.Value, index: int | ir.Value) -> None:
        """Prefetch the cache line of &pointer[index] into L2."""
        hints = [ir.Constant(I32, hint) for hint in (0, 2, 1)]  # read; locality 2 of 3; data
        self._call("llvm.prefetch.p0", VOID, self.at(pointer, index), *hints)

    def scalar(self, pointer: ir.Value, index: int | ir.Value = 0) -> ir.Value:
        """pointer[index]."""
        return self.builder.load(self.at(pointer, index), align=4, typ=F32)

    def spread(self, value: float | ir.Value) -> ir.Value:
        """A float32 in every lane."""
        if isinstance(value, float):
            nearest = struct.unpack("f", struct.pack("f", value))[0]  # LLVM accepts only float32 constants here
            return ir.Constant(self.vector, [ir.Constant(F32, nearest)] * self.lanes)
        b, nothing = self.builder, ir.Constant(self.vector, ir.Undefined)
        first = b.insert_element(nothing, value, self.index(0))
        return b.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes))

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x·y + z, rounded once."""
        return self._intrinsic("llvm.fma", x, y, z)

    def sqrt(self, x: ir.Value) -> ir.Value:
        """√x."""
        return self._intrinsic("llvm.sqrt", x)

    def _intrinsic(self, name: str, *arguments: ir.Value) -> ir.Value:
        kind = arguments[0].type
        return self._call(name + (f".v{self.lanes}f32" if kind == self.vector else ".f32"), kind, *arguments)

    def _call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        module, kinds = self.builder.module, [argument.type for argument in arguments]
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(result, kinds), name)
        return self.builder.call(function, arguments)

    def clamp(self, x: ir.Value, bound: float) -> ir.Value:
        """x clamped to ±bound; +bound for NaN, as the processor's minimum instruction gives."""
        b, high, low = self.builder, self.spread(bound), self.spread(-bound)
        x = b.select(b.fcmp_ordered("<", x, high), x, high)
        return b.select(b.fcmp_ordered(">", x, low), x, low)

    def transposed(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """The columns of as many vectors as there are lanes: off-diagonal blocks of 1, 2, 4, … lanes are swapped."""
        rows, size = list(rows), 1
        while size < self.lanes:
            # The lane of the first vector, or that of the second after it.
            upper = [self.lanes + lane - size if lane & size else lane for lane in range(self.lanes)]
            lower = [self.lanes + lane if lane & size else lane + size for lane in range(self.lanes)]
            masks = [ir.Constant(ir.VectorType(I32, self.lanes), lanes) for lanes in (upper, lower)]
            for i in (i for i in range(self.lanes) if not i & size):
                pair = rows[i], rows[i + size]
                rows[i], rows[i + size] = (self.builder.shuffle_vector(*pair, mask) for mask in masks)
            size *= 2
        return rows

    def sum_of_lanes(self, vector: ir.Value) -> ir.Value:
        """Added up by halves."""
        b, width = self.builder, self.lanes
        while width > 1:
            width //= 2
            halves = [ir.Constant(ir.VectorType(I32, width), list(range(i, i + width))) for i in (0, width)]
            vector = b.fadd(*(b.shuffle_vector(vector, vector, half) for half in halves))
        return b.extract_element(vector, self.index(0))
