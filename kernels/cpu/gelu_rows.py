"""GELU of saved hidden activations, and in the backward GELU and the gradient in one pass.

    forward:   h = GELU(a)                 backward:  h = GELU(a),  da = dh·GELU'(a)

Array sizes are multiples of a vector's lanes; each thread takes a part.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .gelu import gelu, gelu_derivative
from .machine import Machine
from .work_sharing import entry, share


class ElementwiseSizes(NamedTuple):
    """The kernel for the fields a, h, dh and count. h may be a; da is written over dh."""

    backward: bool

    def emit(self, machine: Machine) -> ir.Module:
        """The module."""
        module = ir.Module()
        e, (a, h, dh, count) = entry(module, machine, 3, 1)
        b, lanes = e.builder, machine.lanes
        numbers = [e.times(vector, lanes) for vector in share(e, e.over(count, lanes))]

        def vector(i: ir.Value) -> None:
            x = e.load(a, i)
            if self.backward:
                e.store(b.fmul(e.load(dh, i), gelu_derivative(e, x)), dh, i)
            e.store(gelu(e, x), h, i)

        e.loop(*numbers, lanes, vector)
        b.ret_void()
        return module
