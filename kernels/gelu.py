"""GELU and its derivative as device functions on float32 values, exact and in a short form.

    Φ(x) = ½·(1 + erf(x/√2))        φ(x) = exp(−x²/2)/√(2π)        GELU(x) = x·Φ(x)        GELU′(x) = Φ(x) + x·φ(x)

The form "exact" (float32 tensors) calls erf, about 34 instructions. The short forms (tensors of 16 bits) replace Φ by
½ + x·p(x²), clamped to [0, 1], with a polynomial p of seven or nine coefficients: "short7" for the bfloat16 forward,
"short9" for float16 and for both derivatives. They solve a linear program: the least largest error of x·Φ(x) in units
of the last place of its bfloat16 rounding for |x| ≤ 3 (in short9 ten times less around −0.75, where GELU′ is zero),
less than 2^-13 for −4 ≤ x ≤ −3, and x·p(x²) outside [−½, ½] beyond. The leading coefficient is positive, so large |x|
and infinities saturate Φ without a comparison: the clamp is a modifier of the last multiply-add, and the whole GELU is
9 or 11 instructions. The derivative adds two multiply-adds and one ex2.

Bounds reached, over every input of the type, after rounding to it, against the exact function of that input (ulp:
distance from its correct rounding, absolute: from its value). Before rounding short7 is within 0.81 ulp of bfloat16,
short9 within 0.02.

| type     | GELU, x ≥ −3  | GELU, x < −3 | GELU′, x ≥ −3                                    | GELU′, x < −3 |
|----------|---------------|--------------|--------------------------------------------------|---------------|
| bfloat16 | 1 ulp         | 1.2e-4       | 1 ulp                                            | 3.3e-5        |
| float16  | 1 ulp         | 1.2e-4       | 1 ulp; 3 ulp (2e-7) at −0.751953125, by the zero | 2.9e-5        |

NaN gives NaN, +∞ gives +∞ and −∞ gives NaN (−∞·0), as x·Φ(x) does in float64; GELU′(±∞) is NaN, as in PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FORMS = {torch.float32: "exact", torch.float16: "short9", torch.bfloat16: "short7"}


def gelu_form(dtype: torch.dtype) -> str:
    """FORM of the device functions for values that are rounded to ``dtype``."""
    return _FORMS[dtype]


@triton.jit
def _normal_cdf(x, FORM: tl.constexpr):
    if FORM == "short7":
        t = x * x
        p = tl.fma(t, 1.739764954322709e-08, -1.2795967450074386e-06)
        p = tl.fma(p, t, 4.0430448279948905e-05)
        p = tl.fma(p, t, -0.0007245123269967735)
        p = tl.fma(p, t, 0.008214845322072506)
        p = tl.fma(p, t, -0.0628880187869072)
        p = tl.fma(p, t, 0.3960232138633728)
        return tl.clamp(tl.fma(p, x, 0.5), 0.0, 1.0)
    elif FORM == "short9":
        t = x * x
        p = tl.fma(t, 9.344558460355756e-11, -7.754940689608247e-09)
        p = tl.fma(p, t, 2.891428607654234e-07)
        p = tl.fma(p, t, -6.501325970020844e-06)
        p = tl.fma(p, t, 0.00010018479224527255)
        p = tl.fma(p, t, -0.0011377482442185283)
        p = tl.fma(p, t, 0.009881129488348961)
        p = tl.fma(p, t, -0.06640690565109253)
        p = tl.fma(p, t, 0.39891690015792847)
        return tl.clamp(tl.fma(p, x, 0.5), 0.0, 1.0)
    else:
        tl.static_assert(FORM == "exact", "unknown form of GELU")
        return tl.fma(tl.erf(x * 0.7071067811865476), 0.5, 0.5)


@triton.jit
def gelu(x, FORM: tl.constexpr):
    """GELU of float32 ``x``."""
    return x * _normal_cdf(x, FORM)


@triton.jit
def gelu_and_grad(x, FORM: tl.constexpr):
    """(GELU(x), GELU′(x)) of float32 ``x``; what the caller drops costs nothing. Both short forms are short9 here."""
    cdf = _normal_cdf(x, "short9" if FORM == "short7" else FORM)
    pdf = tl.exp2(tl.fma(x * x, -0.7213475204444817, -1.3257480647361593))  # log2 of exp(-x²/2) / sqrt(2π)
    return x * cdf, tl.fma(x, pdf, cdf)


@triton.jit
def gelu_tanh_and_grad(x):
    """The tanh form, x·½·(1 + tanh u) = x·σ(2u) with u = √(2/π)·(x + 0.044715·x³), and its derivative."""
    t = x * x
    sigmoid = 1.0 / (1.0 + tl.exp(x * tl.fma(t, -0.07135481282553254, -1.5957691216057308)))
    slope = tl.fma(t, 0.21406443847659762, 1.5957691216057308)  # d(2u)/dx
    return x * sigmoid, tl.fma(x * slope, sigmoid * (1.0 - sigmoid), sigmoid)
