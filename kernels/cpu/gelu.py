"""GELU and its derivative in float32 without a division or an exponential.

    GELU(x) = x·(1/2 + f(x)),  f(x) = Φ(x) − 1/2 = erf(x/√2)/2        GELU'(x) = 1/2 + g(x),  g(x) = f(x) + x·φ(x)

f and g are odd. Up to a limit they are approximated by x·P(s) with s = 2·(x/limit)² − 1, where P has degree 15 and 19
and is fitted to minimise the largest error of f and g (Lawson's iteration in the Chebyshev basis). The errors are at
most 9e-9 and 4e-9, or 1e-7 and 2.4e-7 when computed in float32, which rounds 1/2 + f to 6e-8 in any case. In powers of
s no coefficient exceeds 0.13, so Horner's rule is safe. Beyond the limits f and g are 1/2 to float32's last digit.
"""

from __future__ import annotations

from llvmlite import ir

from .llvm_builder import Emitter

F_LIMIT = 5.5
F = (
    0.12855193, -0.064172335, 0.0477376282, -0.0387927853, 0.0320702605,
    -0.0260482561, 0.0203645676, -0.0149991009, 0.0102278208, -0.00681985216,
    0.00462179212, -0.00241872668, 0.000720096694, -0.000529079873, 0.00063156226,
    -0.000236431821,
)  # fmt: skip
G_LIMIT = 6.0
G = (
    0.117897756, -0.0593427531, 0.0460580587, -0.0423691906, 0.0445455834,
    -0.0508679673, 0.0588053539, -0.064890027, 0.0662485808, -0.0631092042,
    0.0563649572, -0.0434207246, 0.0279103909, -0.0215311311, 0.0197185818,
    -0.00931898039, -0.000203765012, -0.00116925186, 0.00326343859, -0.00125636975,
)  # fmt: skip


def _odd(e: Emitter, x: ir.Value, limit: float, coefficients: tuple[float, ...]) -> ir.Value:
    inside = e.clamp(x, limit)
    s = e.fma(e.builder.fmul(inside, inside), e.spread(2.0 / limit**2), e.spread(-1.0))
    p = e.spread(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        p = e.fma(p, s, e.spread(coefficient))
    return e.builder.fmul(p, inside)


def gelu(e: Emitter, x: ir.Value) -> ir.Value:
    """GELU of a vector; NaN stays NaN, and infinity infinity."""
    f = e.clamp(_odd(e, x, F_LIMIT, F), 0.5)
    return e.builder.fmul(x, e.builder.fadd(f, e.spread(0.5)))


def gelu_derivative(e: Emitter, x: ir.Value) -> ir.Value:
    """GELU' of a vector; NaN stays NaN."""
    b = e.builder
    g = b.fadd(_odd(e, x, G_LIMIT, G), e.spread(0.5))
    return b.select(b.fcmp_unordered("uno", x, x), x, g)
