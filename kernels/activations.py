"""The activations of the pointwise MLP by name, on float32 values: value alone, or value and derivative.

ACT is one of ``ACTIVATIONS``. FORM selects the form of the exact GELU (see ``gelu.py``); the other activations have
one form.
"""

import triton
import triton.language as tl

from .gelu import gelu, gelu_and_grad, gelu_tanh_and_grad

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "selu")


@triton.jit
def activation(x, ACT: tl.constexpr, FORM: tl.constexpr):
    """ACT(x)."""
    if ACT == "gelu":
        return gelu(x, FORM)
    else:
        value, _ = activation_and_grad(x, ACT, FORM)
        return value


@triton.jit
def activation_and_grad(x, ACT: tl.constexpr, FORM: tl.constexpr):
    """(ACT(x), ACT′(x)); the derivative of ReLU at 0 is 0, that of SELU the left one, as in PyTorch."""
    if ACT == "gelu":
        return gelu_and_grad(x, FORM)
    elif ACT == "gelu_new":
        return gelu_tanh_and_grad(x)
    elif ACT == "relu":
        return tl.where(x <= 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        return x * sigmoid, tl.fma(x * sigmoid, 1.0 - sigmoid, sigmoid)
    else:
        tl.static_assert(ACT == "selu", "unknown activation")
        left = 1.7580993408473766 * tl.exp(tl.minimum(x, 0.0))  # scale · alpha · exp(x)
        positive = x > 0.0
        value = tl.where(positive, 1.0507009873554805 * x, left - 1.7580993408473766)
        return tl.where(x == x, value, x), tl.where(positive, 1.0507009873554805, left)
