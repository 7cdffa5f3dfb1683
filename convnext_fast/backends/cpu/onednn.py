"""Calls of oneDNN, PyTorch's CPU library, that are faster than PyTorch's usual calls.

`linear`: PyTorch gives float32 matrix products to its BLAS; oneDNN's own apply the activation and add the residual to a
tile of the product while it is in registers. `dwconv_weight_grad`: oneDNN has no fast kernel for the weight gradient of
a depthwise convolution in NHWC. But for one sample it is itself a depthwise convolution, of x by du:

    dw[c, ky, kx] = Σ_hw du[h, w, c] · x[h + ky − k//2, w + kx − k//2, c]

whose filters are the maps of du, and oneDNN's forward kernel is fast at any filter size.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from .llvm import dense

# ReLU is missing because oneDNN's maps NaN to 0, and SELU because oneDNN has none.
_FUSED_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "silu": ("swish", "")}

# The largest filter: larger ones gain nothing and sum all products in one chain.
_LARGEST_FILTER = 56

_X86 = platform.machine() in ("x86_64", "AMD64")


def supports(x: Tensor) -> bool:
    """Whether oneDNN computes for tensors like x: float32 on an x86 CPU, unless ``torch.backends.mkldnn`` is off.

    Empty tensors and tensors with the negative bit are not supported. Neither is tracing: a compiler traces these calls
    only if it has given up on the model around them, and it cannot lower them.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)  # not a tracer's tensor, which has no memory
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not x.is_neg()
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and _X86
    )


def fuses(act: str) -> bool:
    """Whether `linear` can apply the activation."""
    return act in _FUSED_ACTIVATIONS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor:
    """act(x·weightᵀ + bias) for x (P, C), weight (K, C) and bias (K,), of any strides; act: None, or `fuses` it."""
    attribute, algorithm = ("none", "") if act is None else _FUSED_ACTIVATIONS[act]
    return torch.ops.mkldnn._linear_pointwise.default(x, dense(weight), dense(bias), attribute, [], algorithm)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x·weightᵀ + bias."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, dense(weight), dense(bias), "add")


def dwconv_weight_grad(x: Tensor, du: Tensor, side: int) -> Tensor:
    """(C, 1, side, side), the sum over samples of the formula above, in at least float32; x and du: (N, H, W, C)."""
    wide = torch.promote_types(du.dtype, torch.float32)
    x, du = x.permute(0, 3, 1, 2).to(wide), du.permute(0, 3, 1, 2).to(wide)
    samples, channels, height, width = x.shape
    pad = side // 2
    total = x.new_zeros(1, channels, side, side)
    if max(height, width) <= _LARGEST_FILTER:
        for n in range(samples):
            total += F.conv2d(x[n : n + 1], du[n].unsqueeze(1), padding=pad, groups=channels)
        return total.view(channels, 1, side, side)
    x = F.pad(x, (pad, pad, pad, pad))
    for n in range(samples):
        for top in range(0, height, _LARGEST_FILTER):
            for left in range(0, width, _LARGEST_FILTER):
                filters = du[n, :, top : top + _LARGEST_FILTER, left : left + _LARGEST_FILTER].unsqueeze(1)
                bottom, right = top + filters.shape[2] + 2 * pad, left + filters.shape[3] + 2 * pad
                total += F.conv2d(x[n : n + 1, :, top:bottom, left:right], filters, groups=channels)
    return total.view(channels, 1, side, side)
