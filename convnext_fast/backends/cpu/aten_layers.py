"""LayerNorm, the activations and the linear layers of a block on rows of pixels, by calls of ATen and oneDNN.

In float32 the products go to oneDNN (see ``onednn``), which fuses the activation and the residual into them.

P pixels, C channels, K hidden units, T the compute dtype, R the dtype of the residual stream.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import ACTIVATION_FUNCTIONS
from . import llvm, onednn

_aten = torch.ops.aten

# In place.
ACTIVATIONS_ = {
    "gelu": _aten.gelu_,
    "gelu_new": partial(_aten.gelu_, approximate="tanh"),
    "relu": torch.relu_,
    "silu": _aten.silu_,
    "selu": torch.selu_,
}
_BACKWARDS = {
    "gelu": (_aten.gelu_backward.grad_input,),
    "gelu_new": (partial(_aten.gelu_backward.grad_input, approximate="tanh"),),
    "relu": (_aten.threshold_backward.grad_input, 0),
    "silu": (_aten.silu_backward.grad_input,),
}


def activation(a: Tensor, act: str) -> Tensor:
    """act(a), a new tensor."""
    if act == "gelu" and onednn.supports(a) and llvm.supports_gelu(a):
        return llvm.gelu(a)
    return ACTIVATION_FUNCTIONS[act](a)


def activation_and_bwd_(dh: Tensor, a: Tensor, act: str, h: Tensor) -> tuple[Tensor, Tensor]:
    """dh·act'(a), written over dh, and act(a), written to h, which may be a."""
    if act == "gelu" and onednn.supports(a) and llvm.supports_gelu(a):
        llvm.gelu_bwd_(dh, a, h)
        return dh, h
    if act == "selu":
        _aten.elu_backward.grad_input(dh, 1.6732632423543772, 1.0507009873554805, 1.0, False, a, grad_input=dh)
    else:
        backward, *constants = _BACKWARDS[act]
        backward(dh, a, *constants, grad_input=dh)
    return dh, ACTIVATIONS_[act](h if h is a else h.copy_(a))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of ``dtype`` are summed."""
    return torch.promote_types(dtype, torch.float32)


class Norm(NamedTuple):
    """LayerNorm: weight and bias (C,), None for the identity, and epsilon."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """LayerNorm(u), μ and rstd for u (P, C)."""
        return torch.native_layer_norm(u, [u.shape[1]], *self._affine(u), self.eps)

    def backward(
        self, dn: Tensor, u: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(du, dg, dβ)."""
        needs = [True, self.weight is not None, self.bias is not None]
        return _aten.native_layer_norm_backward(dn, u, [u.shape[1]], mean, rstd, *self._affine(u), needs)

    def _affine(self, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The weight and bias in the dtype of sums, so that PyTorch keeps the statistics in it too."""
        wide, weight, bias = sum_dtype(u.dtype), self.weight, self.bias
        if wide != u.dtype and weight is None:
            weight = u.new_ones(u.shape[1], dtype=wide)
        return None if weight is None else weight.to(wide), None if bias is None else bias.to(wide)


class Mlp(NamedTuple):
    """The parameters after LayerNorm; w1 (K, C), b1 (K,), w2 (C, K), b2 (C,), γ (C,) or None."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    gamma: Tensor | None
    act: str

    def to(self, dtype: torch.dtype) -> Mlp:
        """The linear layers in ``dtype``."""
        return self._replace(**{name: getattr(self, name).to(dtype) for name in ("w1", "b1", "w2", "b2")})

    def second(self, h: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
        """residual + scale·γ·(h·w2ᵀ + b2) for rows of h in T and of the residual in R; scale: (P, 1)."""
        gamma, adds = self.gamma, residual is not None and self.gamma is None and scale is None
        if adds and onednn.supports(h) and onednn.supports(residual):
            return onednn.linear_add(h, self.w2, self.b2, residual)
        z = linear(h, self.w2, self.b2)
        if scale is not None:
            z *= scale
        if residual is None:
            return z if gamma is None else (z * gamma).to(z.dtype)
        if gamma is None:
            return residual + z
        return torch.addcmul(residual, z, gamma, out=z if z.dtype == residual.dtype == gamma.dtype else None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None) -> Tensor:
    """act(x·weightᵀ + bias) in the dtype of x."""
    inside = None
    if onednn.supports(x):
        inside = act if act is not None and onednn.fuses(act) else None
        y = onednn.linear(x, weight, bias, inside)
    else:
        y = F.linear(x, weight, bias)
    return y if act == inside else ACTIVATIONS_[act](y)


# Rows of a block: few enough that their hidden activations stay near the last-level cache, and enough that matrix
# products run at full speed and Python's overhead is small. With 36 MiB of cache, training with ATen took 5 to 6 %
# longer with a quarter of these rows, and 3 to 7 % longer without blocks.
_MOST_ROWS, _LEAST_ROWS = 8192, 256
_CACHE_BYTES = 96 << 20


def row_blocks(rows: int, row_bytes: int, most: int = _MOST_ROWS, cache_bytes: int = _CACHE_BYTES) -> list[slice]:
    """Slices of about equal size that fit the cache, with ``row_bytes`` per row; one empty slice if there are no rows.

    A slice has at most ``most`` rows and about ``cache_bytes`` bytes.
    """
    most = min(most, max(_LEAST_ROWS, cache_bytes // row_bytes))
    count = max(1, -(-rows // most))
    size = -(-rows // count)
    return [slice(i * size, min((i + 1) * size, rows)) for i in range(count)]
