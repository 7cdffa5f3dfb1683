"""GELU and its derivative as device functions on float32 values, exact and in a short form.

    Φ(x) = ½·(1 + erf(x/√2))        φ(x) = exp(−x²/2)/√(2π)        GELU(x) = x·Φ(x)        GELU′(x) = Φ(x) + x·φ(x)

The form "exact" (float32 tensors) calls erf, about 34 instructions. The short forms (tensors of 16 bits) take

    GELU(x) = x/2 + |x/2|·(1 − 2^p(|x|))        2^p(t) ≈ 2·(1 − Φ(t))

with a polynomial p of degree 3 for bfloat16 ("short3", 7 instructions, one of them ex2) or 5 for float16 ("short5", 9
instructions), because the logarithm of the normal tail is nearly a parabola. p solves a linear program: it minimises
GELU's largest error in ulp of the rounded value for −3 ≤ x ≤ 0, with an error below 2^-13 for x < −3. Its leading
coefficient is negative, so that the tail of large |x| and of infinities is zero without a comparison.

The derivative in both short forms replaces Φ by ½ + x·q(x²), clamped to [0, 1], with nine coefficients (a linear
program too, with ten times the weight around −0.75, where GELU′ is zero). The leading coefficient is positive, so Φ
saturates, and the clamp is a modifier of the last multiply-add. φ adds two multiply-adds and one ex2.

Bounds reached, over every input of the type, after rounding to it, against the exact function of that input (ulp:
distance from its correct rounding, absolute: from its value). Before rounding short3 is within 0.37 ulp of bfloat16,
short5 within 0.03 ulp of float16; of all inputs from −3 on 1.5 % and 0.5 % are not rounded correctly.

| type     | GELU, x ≥ −3 | GELU, x < −3 | GELU′, x ≥ −3                                    | GELU′, x < −3 |
|----------|--------------|--------------|--------------------------------------------------|---------------|
| bfloat16 | 1 ulp        | 2.2e-5       | 1 ulp                                            | 3.3e-5        |
| float16  | 1 ulp        | 2.0e-6       | 1 ulp; 3 ulp (2e-7) at −0.751953125, by the zero | 2.9e-5        |

NaN gives NaN, +∞ gives +∞ and −∞ gives NaN (−∞·0), as x·Φ(x) does in float64; GELU′(±∞) is NaN, as in PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FORMS = {torch.float32: "exact", torch.float16: "short5", torch.bfloat16: "short3"}


def gelu_form(dtype: torch.dtype) -> str:
    """FORM of the device functions for values that are rounded to ``dtype``."""
    return _FORMS[dtype]


@triton.jit
def _exact_cdf(x):
    return tl.fma(tl.erf(x * 0.7071067811865476), 0.5, 0.5)


@triton.jit
def _tail_log2(t, FORM: tl.constexpr):
    """log2(2·(1 − Φ(t))) of t ≥ 0."""
    if FORM == "short3":
        p = tl.fma(t, -0.022089680656790733, -0.5066405534744263)
        p = tl.fma(p, t, -1.1262139081954956)
        return tl.fma(p, t, -0.0020408635027706623)
    else:
        tl.static_assert(FORM == "short5", "unknown form of GELU")
        p = tl.fma(t, -0.0004667913308367133, 0.007037371397018433)
        p = tl.fma(p, t, -0.051740776747465134)
        p = tl.fma(p, t, -0.459991991519928)
        p = tl.fma(p, t, -1.1508703231811523)
        return tl.fma(p, t, -9.813069482333958e-06)


@triton.jit
def gelu(x, FORM: tl.constexpr):
    """GELU of float32 ``x``."""
    if FORM == "exact":
        return x * _exact_cdf(x)
    else:
        half = 0.5 * x
        return tl.fma(tl.abs(half), 1.0 - tl.exp2(_tail_log2(tl.abs(x), FORM)), half)


@triton.jit
def twice_gelu(x, FORM: tl.constexpr):
    """2·GELU of float32 ``x`` in a short form, an instruction less: for a product whose sum is halved."""
    return tl.fma(tl.abs(x), 1.0 - tl.exp2(_tail_log2(tl.abs(x), FORM)), x)


@triton.jit
def gelu_and_grad(x, FORM: tl.constexpr):
    """(GELU(x), GELU′(x)) of float32 ``x``; what the caller drops costs nothing. The short forms are one here."""
    t = x * x
    if FORM == "exact":
        cdf = _exact_cdf(x)
    else:
        q = tl.fma(t, 9.344558460355756e-11, -7.754940689608247e-09)
        q = tl.fma(q, t, 2.891428607654234e-07)
        q = tl.fma(q, t, -6.501325970020844e-06)
        q = tl.fma(q, t, 0.00010018479224527255)
        q = tl.fma(q, t, -0.0011377482442185283)
        q = tl.fma(q, t, 0.009881129488348961)
        q = tl.fma(q, t, -0.06640690565109253)
        q = tl.fma(q, t, 0.39891690015792847)
        cdf = tl.clamp(tl.fma(q, x, 0.5), 0.0, 1.0)
    pdf = tl.exp2(tl.fma(t, -0.7213475204444817, -1.3257480647361593))  # log2 of exp(-x²/2) / sqrt(2π)
    return x * cdf, tl.fma(x, pdf, cdf)


@triton.jit
def gelu_tanh_and_grad(x):
    """The tanh form, x·½·(1 + tanh u) = x·σ(2u) with u = √(2/π)·(x + 0.044715·x³), and its derivative."""
    t = x * x
    sigmoid = 1.0 / (1.0 + tl.exp(x * tl.fma(t, -0.07135481282553254, -1.5957691216057308)))
    slope = tl.fma(t, 0.21406443847659762, 1.5957691216057308)  # d(2u)/dx
    return x * sigmoid, tl.fma(x * slope, sigmoid * (1.0 - sigmoid), sigmoid)
