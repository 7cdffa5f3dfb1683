"""The gradients of w2 and of the layer scale from E = Σ_p dz ⊗ h, in one pass over E and the weight.

dot[c] = Σ_k w2[c, k]·E[c, k], dγ without b2's part     dw2[c, k] = γ[c]·E[c, k], written over E
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .machine import Machine
from .work_sharing import entry, share

_SUMMED = 16
"""Vectors in one chain of additions."""


class LayerScaleSizes(NamedTuple):
    """The kernel for the addresses of E, w2 (C, K), γ and dot (C,)."""

    channels: int
    hidden: int

    def emit(self, machine: Machine) -> ir.Module:
        """The module."""
        module = ir.Module()
        e, (gradient, weight, gamma, dot) = entry(module, machine, 4)
        b, (channels, hidden), lanes = e.builder, self, machine.lanes

        def row(c: ir.Value) -> None:
            ours, weights = (e.at(array, e.times(c, hidden)) for array in (gradient, weight))
            factor = e.spread(e.scalar(gamma, c))

            def vector(k: ir.Value, part: ir.Value) -> list[ir.Value]:
                value = e.load(ours, k)
                e.store(b.fmul(value, factor), ours, k)
                return [e.fma(value, e.load(weights, k), part)]

            def few(k: ir.Value, total: ir.Value) -> list[ir.Value]:
                end = e.smaller(e.plus(k, _SUMMED * lanes), hidden)
                return [b.fadd(total, *e.loop(k, end, lanes, vector, e.spread(0.0)))]

            (total,) = e.loop(0, hidden, _SUMMED * lanes, few, e.spread(0.0))
            b.store(e.sum_of_lanes(total), e.at(dot, c), align=4)

        e.loop(*share(e, channels), 1, row)
        b.ret_void()
        return module
