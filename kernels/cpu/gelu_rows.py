"""GELU of saved hidden activations, and in the backward GELU and the gradient in one pass.

    forward:   h = GELU(a)                 backward:  h = GELU(a),  da = dh·GELU'(a)

Array sizes are multiples of the vector's lanes; each thread takes a part.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .gelu import gelu, gelu_derivative
from .llvm_builder import I64, POINTER
from .machine import Machine
from .work_sharing import entry, share


class ElementwiseSizes(NamedTuple):
    """What a kernel is compiled for."""

    backward: bool


class Elementwise:
    """Emits ``elementwise(argument)`` for the fields a, h, dh and count. h may be a; da takes the place of dh."""

    NAME = "elementwise"

    def __init__(self, machine: Machine, sizes: ElementwiseSizes):
        self.machine, self.backward = machine, sizes.backward

    def emit(self) -> ir.Module:
        """The module."""
        module = ir.Module(self.NAME)
        e, (a, h, dh, count) = entry(module, self.machine, self.NAME, (POINTER, POINTER, POINTER, I64))
        b, lanes = e.builder, self.machine.lanes
        numbers = [e.times(vector, lanes) for vector in share(e, e.over(count, lanes))]

        def vector(i: ir.Value) -> None:
            x = e.load(a, i)
            if self.backward:
                e.store(b.fmul(e.load(dh, i), gelu_derivative(e, x)), dh, i)
            e.store(gelu(e, x), h, i)

        e.loop(*numbers, lanes, vector)
        b.ret_void()
        return module
