"""The ConvNeXt ops as plain eager PyTorch: what ``fused=False`` runs, and what every other path is checked against.

Activations are (N, H, W, C). Every function takes ``dtype``: None computes in the dtypes given (and under autocast as
PyTorch decides), any other casts all inputs first, so that tests can ask for the same formula in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATION_FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda a: F.gelu(a, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "selu": F.selu,
}


def _cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or dtype is None else t.to(dtype) for t in tensors]


def dwconv(x: Tensor, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype | None = None) -> Tensor:
    """Depthwise k×k convolution, stride 1, "same" padding. x: (N, H, W, C); weight: (C, 1, k, k); bias: (C,)."""
    x, weight, bias = _cast(dtype, x, weight, bias)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=weight.shape[0]).permute(0, 2, 3, 1)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm over the last dimension; its affine may be None."""
    x, weight, bias = _cast(dtype, x, weight, bias)
    # ONNX export by tracing treats the shape of a weight as a constant, but not that of an activation.
    shape = x.shape[-1:] if weight is None else weight.shape
    return F.layer_norm(x, tuple(shape), weight, bias, eps)


def dwconv_layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm(dwconv(x)): (N, H, W, C) to (N, H, W, C)."""
    return layer_norm(dwconv(x, weight, bias, dtype=dtype), ln_weight, ln_bias, eps, dtype=dtype)


def global_response_norm(
    h: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None
) -> Tensor:
    """γ·h·N + β + h for N = G/(mean_k G + eps), G the norm of each unit k over the pixels of a sample.

    h: (N, H, W, K); weight, bias: γ and β (K,). G is summed in at least float32.
    """
    h, weight, bias = _cast(dtype, h, weight, bias)
    norms = torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True, dtype=torch.promote_types(h.dtype, torch.float32))
    return h + torch.addcmul(bias, weight, h * (norms / (norms.mean(-1, keepdim=True) + eps)).to(h.dtype))


def pointwise_mlp(
    x: Tensor,
    residual: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    act: str,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + drop_scale · γ · (act(x·w1ᵀ + b1)·w2ᵀ + b2), per pixel.

    x, residual: (N, H, W, C) or None for no residual; w1: (K, C); w2: (C, K); gamma: (C,) or None for 1;
    drop_scale: (N,), the drop-path factor of each sample, or None for 1; grn_weight, grn_bias: (K,) of the global
    response norm of act(…), or None for none.
    """
    x, residual, w1, b1, w2, b2, gamma, drop_scale = _cast(dtype, x, residual, w1, b1, w2, b2, gamma, drop_scale)
    h = ACTIVATION_FUNCTIONS[act](F.linear(x, w1, b1))
    if grn_weight is not None:
        h = global_response_norm(h, grn_weight, grn_bias, dtype=dtype)
    z = F.linear(h, w2, b2)
    if gamma is not None:
        z = gamma * z
    if drop_scale is not None:
        z = z * drop_scale.view(-1, 1, 1, 1).to(z.dtype)
    return z if residual is None else residual + z


def convnext_block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One ConvNeXt block: x + drop_path(γ · fc2(grn(act(fc1(LayerNorm(dwconv(x))))))), V1 without grn, V2 without γ."""
    n = dwconv_layernorm(x, dwconv_weight, dwconv_bias, ln_weight, ln_bias, eps, dtype=dtype)
    return pointwise_mlp(n, x, w1, b1, w2, b2, gamma, drop_scale, act, grn_weight, grn_bias, dtype=dtype)


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype | None = None) -> Tensor:
    """Convolution of non-overlapping patches: (N, H, W, C) to (N, ⌊H/kh⌋, ⌊W/kw⌋, C'), weight (C', C, kh, kw)."""
    x, weight, bias = _cast(dtype, x, weight, bias)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=tuple(weight.shape[2:])).permute(0, 2, 3, 1)


def patchify_stem(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The stem: patch convolution, then LayerNorm. image: (N, C, H, W); returns (N, ⌊H/kh⌋, ⌊W/kw⌋, C')."""
    return layer_norm(
        patch_conv(image.permute(0, 2, 3, 1), weight, bias, dtype=dtype), ln_weight, ln_bias, eps, dtype=dtype
    )


def downsample(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The layer between stages: LayerNorm, then patch convolution, (N, H, W, C) to (N, ⌊H/2⌋, ⌊W/2⌋, C')."""
    return patch_conv(layer_norm(x, ln_weight, ln_bias, eps, dtype=dtype), weight, bias, dtype=dtype)
