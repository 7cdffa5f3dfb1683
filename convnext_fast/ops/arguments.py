"""What the fused ops ask of their arguments; each check raises what `ops` says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import ACTIVATIONS
from . import call


def check_activation(x: Tensor, name: str) -> None:
    """Activations of 4 dimensions, of which the first alone may be 0."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: expected a tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: expected a floating dtype")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected 4 dimensions, all but the first at least 1")


def check_tensor(x: Tensor, name: str, value: Tensor | None, shape: tuple[int, ...], optional: bool = False) -> None:
    """A floating tensor of this shape, where x is; None only if ``optional``."""
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
    """A depthwise convolution of x (N, H, W, C), of side 3, 5 or 7."""
    side = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 4 else 7
    if side not in (3, 5, 7):
        raise ValueError(f"the depthwise kernel is {tuple(weight.shape)}: expected a square one of side 3, 5 or 7")
    check_tensor(x, "the depthwise weight", weight, (x.shape[3], 1, side, side))
    check_tensor(x, "the depthwise bias", bias, (x.shape[3],), optional=True)


def check_patches(x: Tensor, weight: Tensor, bias: Tensor | None, channels: int, size: tuple[int, int]) -> None:
    """A convolution of patches of images of this many channels, and this height and width."""
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        what = f"has shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"is a {type(weight).__name__}"
        raise ValueError(f"the patch weight {what}: expected (C', C, kh, kw)")
    check_tensor(x, "the patch weight", weight, (weight.shape[0], channels, *weight.shape[2:]))
    check_tensor(x, "the patch bias", bias, (weight.shape[0],), optional=True)
    if size[0] < weight.shape[2] or size[1] < weight.shape[3]:
        raise ValueError(f"the image is {size[0]}×{size[1]}: expected at least one patch of {tuple(weight.shape[2:])}")


def check_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    channels: int,
    hidden: int,
) -> None:
    """The parameters of a pointwise MLP from ``channels`` to ``hidden`` and back."""
    check_tensor(x, "w1", w1, (hidden, channels))
    check_tensor(x, "b1", b1, (hidden,))
    check_tensor(x, "w2", w2, (channels, hidden))
    check_tensor(x, "b2", b2, (channels,))
    check_tensor(x, "gamma", gamma, (channels,), optional=True)
    check_tensor(x, "drop_scale", drop_scale, (x.shape[0],), optional=True)


def check_options(act: str, recompute: int) -> None:
    """An activation and a level that exist."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}: expected one of {', '.join(ACTIVATIONS)}")
    if recompute not in (0, 1, 2):
        raise ValueError(f"recompute is {recompute!r}: expected 0, 1 or 2")


def compute_dtype(x: Tensor, **weights: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, otherwise x's own."""
    if call.autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    for name, weight in weights.items():
        if weight.dtype != x.dtype:
            raise TypeError(
                f"the activations are {x.dtype} but {name} is {weight.dtype}: convert one, or use torch.autocast"
            )
    return x.dtype


def check_frozen_block(
    remembers: bool,
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> torch.dtype:
    """The dtype in which `ops.frozen_block` computes.

    ``remembers``: whether such tensors need no check the next time, for they are plain ones (`call.is_unseen`).
    """

    def check() -> torch.dtype:
        check_activation(x, "x")
        channels, hidden = x.shape[3], rows_of(w1, "w1")
        check_tensor(x, "b1", b1, (2, hidden))
        check_dwconv(x, dwconv_weight, dwconv_bias)
        check_mlp(x, w1, b1[0], w2, b2, None, None, channels, hidden)
        return compute_dtype(x, dwconv_weight=dwconv_weight, w1=w1, w2=w2)

    return _once(remembers, check, x, dwconv_weight, dwconv_bias, w1, b1, w2, b2)


def check_stem(
    remembers: bool, image: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor
) -> torch.dtype:
    """As `check_frozen_block`, for `ops.patchify_stem`."""

    def check() -> torch.dtype:
        check_activation(image, "image")
        check_patches(image, weight, bias, channels=image.shape[1], size=tuple(image.shape[2:]))
        check_tensor(image, "ln_weight", ln_weight, (weight.shape[0],))
        check_tensor(image, "ln_bias", ln_bias, (weight.shape[0],))
        return compute_dtype(image, weight=weight)

    return _once(remembers, check, image, weight, bias, ln_weight, ln_bias)


def check_frozen_downsample(remembers: bool, x: Tensor, weight: Tensor, bias: Tensor) -> torch.dtype:
    """As `check_frozen_block`, for `ops.frozen_downsample`."""

    def check() -> torch.dtype:
        check_activation(x, "x")
        check_patches(x, weight, bias, channels=x.shape[3], size=tuple(x.shape[1:3]))
        return compute_dtype(x, weight=weight)

    return _once(remembers, check, x, weight, bias)


_PASSED: set[tuple] = set()
"""Descriptions of plain tensors that passed all checks of a call: they are not checked again, which for a small image
on a CPU takes as long as a convolution."""


def _once(remembers: bool, check: Callable[[], torch.dtype], x: Tensor, *weights: Tensor | None) -> torch.dtype:
    """What ``check`` says of tensors, asked once for such if it ``remembers``."""
    if not remembers:
        return check()
    try:
        described = tuple([t if t is None else (t.shape, t.dtype, t.device) for t in (x, *weights)])
    except AttributeError:
        return check()
    if described in _PASSED:
        return x.dtype
    dtype = check()
    if len(_PASSED) > 4096:
        _PASSED.clear()
    _PASSED.add(described)
    return dtype
