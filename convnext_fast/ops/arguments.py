"""Checks of the fused ops' arguments: each raises the errors that `functions` names, or returns the compute dtype.

Plain tensors are checked once for each set of shapes, dtypes and devices: for a small image on a CPU, a check takes as
long as a convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import ACTIVATIONS
from ..kernels.weights import BlockWeights, ConvNorm, FrozenBlock, FrozenDownsample, MlpWeights, NormConv
from . import call
from .signatures import flatten


def check_activation(x: Tensor, name: str) -> None:
    """Activations with 4 dimensions, of which only the first may be 0."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: expected a tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: expected a floating dtype")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected 4 dimensions, all but the first at least 1")


def check_tensor(x: Tensor, name: str, value: Tensor | None, shape: tuple[int, ...], optional: bool = False) -> None:
    """A floating tensor of this shape, on the device of x; None only if ``optional``."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a tensor of shape {shape}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {shape}")
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}: expected a floating dtype")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}: expected {x.device}, where the activations are")


def rows_of(weight: Tensor, name: str) -> int:
    """K of a matrix (K, C)."""
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        what = f"has shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"is a {type(weight).__name__}"
        raise ValueError(f"{name} {what}: expected a matrix (K, C)")
    return weight.shape[0]


def check_dwconv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """A depthwise convolution of x (N, H, W, C), with a kernel of side 3, 5 or 7."""
    side = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 4 else 7
    if side not in (3, 5, 7):
        raise ValueError(f"the depthwise kernel is {tuple(weight.shape)}: expected a square one of side 3, 5 or 7")
    check_tensor(x, "the depthwise weight", weight, (x.shape[3], 1, side, side))
    check_tensor(x, "the depthwise bias", bias, (x.shape[3],), optional=True)


def check_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, channels: int, optional: bool = False) -> None:
    """LayerNorm's weight and bias."""
    check_tensor(x, "ln_weight", weight, (channels,), optional)
    check_tensor(x, "ln_bias", bias, (channels,), optional)


def check_patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None, channels: int, size: tuple[int, int]) -> None:
    """A convolution of patches, for images with this number of channels, and this height and width."""
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        what = f"has shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"is a {type(weight).__name__}"
        raise ValueError(f"the patch weight {what}: expected (C', C, kh, kw)")
    check_tensor(x, "the patch weight", weight, (weight.shape[0], channels, *weight.shape[2:]))
    check_tensor(x, "the patch bias", bias, (weight.shape[0],), optional=True)
    if size[0] < weight.shape[2] or size[1] < weight.shape[3]:
        raise ValueError(f"the image is {size[0]}×{size[1]}: expected at least one patch of {tuple(weight.shape[2:])}")


def check_pointwise(x: Tensor, weights: MlpWeights, drop_scale: Tensor | None) -> None:
    """The parameters of a pointwise MLP on x (N, H, W, C)."""
    channels, hidden = x.shape[3], rows_of(weights.w1, "w1")
    check_tensor(x, "w1", weights.w1, (hidden, channels))
    check_tensor(x, "b1", weights.b1, (hidden,))
    check_tensor(x, "w2", weights.w2, (channels, hidden))
    check_tensor(x, "b2", weights.b2, (channels,))
    check_tensor(x, "gamma", weights.gamma, (channels,), optional=True)
    check_tensor(x, "drop_scale", drop_scale, (x.shape[0],), optional=True)


def check_grn(x: Tensor, weight: Tensor | None, bias: Tensor | None, hidden: int) -> None:
    """A global response norm's parameters for this many hidden units."""
    check_tensor(x, "grn_weight", weight, (hidden,))
    check_tensor(x, "grn_bias", bias, (hidden,))


def check_options(act: str, recompute: int) -> None:
    """A known activation and level of ``recompute``."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}: expected one of {', '.join(ACTIVATIONS)}")
    if recompute not in (0, 1, 2):
        raise ValueError(f"recompute is {recompute!r}: expected 0, 1 or 2")


def check_dtypes(x: Tensor, **weights: Tensor) -> torch.dtype:
    """`call.compute_dtype`; without autocast the weights must have x's dtype."""
    for name, weight in weights.items():
        if weight.dtype != x.dtype and not call.autocasts(x):
            raise TypeError(
                f"the activations are {x.dtype} but {name} is {weight.dtype}: convert one, or use torch.autocast"
            )
    return call.compute_dtype(x)


_PASSED: dict[tuple, torch.dtype] = {}
_MOST = 4096

Check = Callable[..., torch.dtype]


def _once(check: Check) -> Check:
    """``check``, made only once for each description of plain tensors and options."""

    @functools.wraps(check)
    def remembered(x: Tensor, *arguments: Any) -> torch.dtype:
        flat = flatten(arguments)
        if type(x) is not Tensor or not call.is_plain(*flat) or torch.jit.is_tracing():
            return check(x, *arguments)
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
        described = tuple([(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in (x, *flat)])
        known = check, autocast, described
        dtype = _PASSED.get(known)
        if dtype is None:
            dtype = check(x, *arguments)
            if len(_PASSED) >= _MOST:
                _PASSED.clear()
            _PASSED[known] = dtype
        return dtype

    return remembered


@_once
def check_block(x: Tensor, weights: BlockWeights, drop_scale: Tensor | None, act: str, recompute: int) -> torch.dtype:
    """Arguments of `functions.convnext_block`."""
    check_activation(x, "x")
    check_dwconv(x, weights.dwconv_weight, weights.dwconv_bias)
    check_affine(x, weights.ln_weight, weights.ln_bias, x.shape[3], optional=True)
    check_pointwise(x, weights.mlp(), drop_scale)
    if weights.grn_weight is not None:
        check_grn(x, weights.grn_weight, weights.grn_bias, len(weights.w1))
    check_options(act, recompute)
    return check_dtypes(x, dwconv_weight=weights.dwconv_weight, w1=weights.w1, w2=weights.w2)


@_once
def check_frozen_block(x: Tensor, weights: FrozenBlock, act: str) -> torch.dtype:
    """Arguments of `functions.frozen_block`."""
    check_activation(x, "x")
    check_dwconv(x, weights.dwconv_weight, weights.dwconv_bias)
    check_tensor(x, "b1", weights.b1, (2, rows_of(weights.w1, "w1")))
    check_pointwise(x, MlpWeights(weights.w1, weights.b1[0], weights.w2, weights.b2, None), None)
    check_tensor(x, "grn_weight", weights.grn_weight, (len(weights.w1),), optional=True)
    check_options(act, 2)
    return check_dtypes(x, dwconv_weight=weights.dwconv_weight, w1=weights.w1, w2=weights.w2)


@_once
def check_dwconv_layernorm(x: Tensor, weights: ConvNorm) -> torch.dtype:
    """Arguments of `functions.dwconv_layernorm`."""
    check_activation(x, "x")
    check_dwconv(x, weights.weight, weights.bias)
    check_affine(x, weights.ln_weight, weights.ln_bias, x.shape[3])
    return check_dtypes(x, weight=weights.weight)


@_once
def check_mlp(
    x: Tensor, residual: Tensor | None, weights: MlpWeights, drop_scale: Tensor | None, act: str, recompute: int
) -> torch.dtype:
    """Arguments of `functions.pointwise_mlp`."""
    check_activation(x, "x")
    check_tensor(x, "residual", residual, tuple(x.shape), optional=True)
    check_pointwise(x, weights, drop_scale)
    check_options(act, recompute)
    return check_dtypes(x, w1=weights.w1, w2=weights.w2)


@_once
def check_norm(h: Tensor, weight: Tensor, bias: Tensor) -> torch.dtype:
    """Arguments of `functions.global_response_norm`."""
    check_activation(h, "h")
    for name, value in (("weight", weight), ("bias", bias)):
        check_tensor(h, name, value, (h.shape[3],))
    return check_dtypes(h)


@_once
def check_stem(image: Tensor, weights: ConvNorm) -> torch.dtype:
    """Arguments of `functions.patchify_stem`."""
    check_activation(image, "image")
    weight = weights.weight
    check_patch_conv(image, weight, weights.bias, channels=image.shape[1], size=tuple(image.shape[2:]))
    check_affine(image, weights.ln_weight, weights.ln_bias, weight.shape[0])
    return check_dtypes(image, weight=weight)


@_once
def check_downsample(x: Tensor, weights: NormConv) -> torch.dtype:
    """Arguments of `functions.downsample`."""
    check_activation(x, "x")
    check_patch_conv(x, weights.weight, weights.bias, channels=x.shape[3], size=tuple(x.shape[1:3]))
    check_affine(x, weights.ln_weight, weights.ln_bias, x.shape[3])
    return check_dtypes(x, weight=weights.weight)


@_once
def check_frozen_downsample(x: Tensor, weights: FrozenDownsample) -> torch.dtype:
    """Arguments of `functions.frozen_downsample`."""
    check_activation(x, "x")
    check_patch_conv(x, weights.weight, weights.bias, channels=x.shape[3], size=tuple(x.shape[1:3]))
    return check_dtypes(x, weight=weights.weight)
