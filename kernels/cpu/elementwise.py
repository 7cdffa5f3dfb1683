"""GELU of saved hidden activations, and in the backward GELU and the gradient in one pass.

    forward:   h = GELU(a)                 backward:  h = GELU(a),  da = dh·GELU'(a)

Arrays of a multiple of the lanes; each thread has a part of them.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .emit import I64, POINTER, Emitter, define
from .gelu import gelu, gelu_derivative
from .machine import Machine
from .team import thread_and_threads


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
        function = define(module, self.NAME, POINTER, local=False)
        e = Emitter(function, self.machine.lanes)
        b, lanes = e.builder, self.machine.lanes
        kinds = POINTER, POINTER, POINTER, I64
        places = [b.gep(function.args[0], [e.index(i)], source_etype=I64) for i in range(len(kinds))]
        a, h, dh, count = (b.load(place, typ=kind) for place, kind in zip(places, kinds, strict=True))
        thread, threads = thread_and_threads(e)
        vectors = e.over(count, lanes)
        share = [e.times(e.over(e.times(vectors, t), threads), lanes) for t in (thread, e.plus(thread, 1))]

        def vector(i: ir.Value) -> None:
            x = e.load(a, i)
            if self.backward:
                e.store(b.fmul(e.load(dh, i), gelu_derivative(e, x)), dh, i)
            e.store(gelu(e, x), h, i)

        e.loop(*share, lanes, vector)
        b.ret_void()
        return module
