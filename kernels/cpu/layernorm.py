"""LayerNorm of one row: x̂ = (x − μ)·rstd, and x̂·g + β, by its mean and then the mean of its squared deviations."""

from __future__ import annotations

from llvmlite import ir

from .llvm_builder import F32, POINTER, Emitter, define
from .machine import Machine


def statistics(e: Emitter, x: ir.Value, channels: int, epsilon: ir.Value) -> tuple[ir.Value, ir.Value]:
    """μ and rstd of a row, in every lane."""
    b, zero, count = e.builder, e.spread(0.0), ir.Constant(F32, float(channels))
    (total,) = e.loop(0, channels, e.lanes, lambda c, s: [b.fadd(s, e.load(x, c))], zero)
    mean = e.spread(b.fdiv(e.sum_of_lanes(total), count))

    def square(c: ir.Value, s: ir.Value) -> list[ir.Value]:
        deviation = b.fsub(e.load(x, c), mean)
        return [e.fma(deviation, deviation, s)]

    (squares,) = e.loop(0, channels, e.lanes, square, zero)
    variance = b.fdiv(e.sum_of_lanes(squares), count)
    return mean, e.spread(b.fdiv(ir.Constant(F32, 1.0), e.sqrt(b.fadd(variance, epsilon))))


def normalise(module: ir.Module, machine: Machine, channels: int, affine: bool = False) -> ir.Function:
    """``f(x, out, epsilon)``, or with ``affine`` ``f(x, out, epsilon, weight, bias)``; out may be x."""
    function = define(module, "normalise", POINTER, POINTER, F32, *[POINTER, POINTER] * affine)
    x, out, epsilon, *parameters = function.args
    e = Emitter(function, machine.lanes)
    b, step = e.builder, machine.lanes
    mean, rstd = statistics(e, x, channels, epsilon)

    def scale(c: ir.Value) -> None:
        n = b.fmul(b.fsub(e.load(x, c), mean), rstd)
        if affine:
            weight, bias = (e.load(parameter, c) for parameter in parameters)
            n = e.fma(n, weight, bias)
        e.store(n, out, c)

    e.loop(0, channels, step, scale)
    b.ret_void()
    return function
