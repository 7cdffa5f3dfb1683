"""The fused ops as PyTorch operators: the only door between the models and the device code.

`convnext_block`, `dwconv_layernorm` and `pointwise_mlp` validate their arguments, choose the path for the device
(see `backend`), and are differentiable, traceable (`torch.compile`, `torch.export`) and aware of autocast. Under
autocast they compute in its dtype and keep the residual stream and the gradients of parameters in the dtypes that eager
PyTorch would give them. Activations are (N, H, W, C) and must be contiguous in memory for speed; any strides work.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.fx
from torch import Tensor

from . import backend, reference
from .config import ACTIVATIONS
from .downsampling import Downsample

__all__ = [
    "convnext_block",
    "downsample",
    "dwconv_layernorm",
    "frozen_block",
    "frozen_downsample",
    "patchify_stem",
    "pointwise_mlp",
]


@torch.fx.wrap
def convnext_block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    act: str = "gelu",
    recompute: int = 1,
) -> Tensor:
    """x + drop_scale · γ · fc2(act(fc1(LayerNorm(dwconv(x))))), one ConvNeXt block (section 2 of the paper).

    Args:
        x: (N, H, W, C).
        dwconv_weight, dwconv_bias: (C, 1, k, k) with k in 3, 5, 7, and (C,) or None.
        ln_weight, ln_bias: (C,), or None where they are folded into ``w1`` and ``b1``.
        w1, b1, w2, b2: (K, C), (K,), (C, K), (C,).
        gamma: (C,), the layer scale, or None.
        drop_scale: (N,), the drop-path factor of each sample (0 or 1/keep), or None. Gets no gradient.
        eps: epsilon of the LayerNorm.
        act: one of ``config.ACTIVATIONS``.
        recompute: what is computed anew in the backward pass instead of saved. 0 saves x, the convolution's output and
            the hidden activations; 1 does without the hidden ones; 2 saves x alone.

    Returns:
        (N, H, W, C), contiguous.

    Raises:
        TypeError: a tensor has a dtype that is not floating, or differs from x's outside autocast.
        ValueError: a shape, a device or an option is not as above.
    """
    _check_activation(x, "x")
    channels, hidden = x.shape[3], _rows_of(w1, "w1")
    _check_dwconv(x, dwconv_weight, dwconv_bias)
    _check(x, "ln_weight", ln_weight, (channels,), optional=True)
    _check(x, "ln_bias", ln_bias, (channels,), optional=True)
    _check_mlp(x, w1, b1, w2, b2, gamma, drop_scale, channels, hidden)
    _check_options(act, recompute)
    dtype = _compute_dtype(x, dwconv_weight=dwconv_weight, w1=w1, w2=w2)
    if gamma is not None:
        x = x.to(torch.promote_types(x.dtype, gamma.dtype))
    path = backend.select(x.device, dtype)
    if path == "reference":
        ln_weight, ln_bias = _affine(x, ln_weight, ln_bias)
        return reference.convnext_block(
            x, dwconv_weight, dwconv_bias, ln_weight, ln_bias, w1, b1, w2, b2, gamma, drop_scale, eps, act
        )
    if not torch.is_grad_enabled():
        recompute = 2
    args = (dwconv_weight, dwconv_bias, ln_weight, ln_bias, w1, b1, w2, b2, gamma, drop_scale)
    return _implementation(path, wants_values(x)).block_fwd(x.contiguous(), *args, eps, act, recompute, dtype)[0]


@torch.fx.wrap
def frozen_block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    eps: float = 1e-6,
    act: str = "gelu",
) -> Tensor:
    """`convnext_block` on what `folding.freeze_block` made of its parameters, without drop path.

    x: (N, H, W, C); w1, b1, w2, b2: see `folding.FrozenBlock`. Where a gradient is wanted, or autocast asks for another
    dtype than that of ``w1``, this is `convnext_block` with these weights.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    _check_options(act, 2)
    tensors = (x, dwconv_weight, dwconv_bias, w1, b1, w2, b2)
    values = wants_values(x)
    dtype = check_frozen_block(values, *tensors)
    path = backend.select(x.device, dtype)
    if w1.dtype != dtype or _wants_gradient(*tensors) or path == "reference":
        mlp = (w1, b1[0].to(w1.dtype), w2, b2.to(w1.dtype))
        return convnext_block(x, dwconv_weight, dwconv_bias, None, None, *mlp, eps=eps, act=act)
    return _implementation(path, values).frozen_block_fwd(x.contiguous(), *tensors[1:], eps, act, dtype)


def check_frozen_block(
    values: bool,
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> torch.dtype:
    """The dtype in which `frozen_block` computes; raises what it raises. ``values``: what `wants_values` says of x."""

    def check() -> torch.dtype:
        _check_activation(x, "x")
        channels, hidden = x.shape[3], _rows_of(w1, "w1")
        _check(x, "b1", b1, (2, hidden))
        _check_dwconv(x, dwconv_weight, dwconv_bias)
        _check_mlp(x, w1, b1[0], w2, b2, None, None, channels, hidden)
        return _compute_dtype(x, dwconv_weight=dwconv_weight, w1=w1, w2=w2)

    return _once(values, check, x, dwconv_weight, dwconv_bias, w1, b1, w2, b2)


def dwconv_layernorm(
    x: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """LayerNorm(dwconv(x)) over the channels. x and the result: (N, H, W, C); parameters as in `convnext_block`.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    _check_activation(x, "x")
    _check_dwconv(x, weight, bias)
    _check(x, "ln_weight", ln_weight, (x.shape[3],))
    _check(x, "ln_bias", ln_bias, (x.shape[3],))
    dtype = _compute_dtype(x, weight=weight)
    path = backend.select(x.device, dtype)
    if path == "reference":
        return reference.dwconv_layernorm(x, weight, bias, ln_weight, ln_bias, eps)
    arguments = (x.contiguous(), weight, bias, ln_weight, ln_bias, eps, dtype)
    return _implementation(path, wants_values(x)).dwconv_layernorm_fwd(*arguments)[0]


def pointwise_mlp(
    x: Tensor,
    residual: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
    *,
    act: str = "gelu",
    recompute: int = 1,
) -> Tensor:
    """residual + drop_scale · γ · fc2(act(fc1(x))), per pixel; parameters as in `convnext_block`.

    x: (N, H, W, C); residual: the same shape, or None for none. Level 0 of ``recompute`` saves the hidden activations.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    _check_activation(x, "x")
    if residual is not None:
        _check(x, "residual", residual, tuple(x.shape))
    _check_mlp(x, w1, b1, w2, b2, gamma, drop_scale, x.shape[3], _rows_of(w1, "w1"))
    _check_options(act, recompute)
    dtype = _compute_dtype(x, w1=w1, w2=w2)
    path = backend.select(x.device, dtype)
    if path == "reference":
        return reference.pointwise_mlp(x, residual, w1, b1, w2, b2, gamma, drop_scale, act)
    if residual is None:
        x = x.to(dtype)
    elif gamma is not None:
        residual = residual.to(torch.promote_types(residual.dtype, gamma.dtype))
    if not torch.is_grad_enabled():
        recompute = 2
    rest = (w1, b1, w2, b2, gamma, drop_scale, act, recompute, dtype)
    run = _implementation(path, wants_values(x)).pointwise_mlp_fwd
    if residual is not None:
        return run(x.contiguous(), residual.contiguous(), *rest)[0]
    y = run(x.contiguous(), None, *rest)[0]
    return y if gamma is None else y.to(torch.promote_types(y.dtype, gamma.dtype))


@torch.fx.wrap
def patchify_stem(
    image: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """The stem: convolution of non-overlapping patches, then LayerNorm.

    image: (N, C, H, W), any strides; weight: (C', C, kh, kw). Returns (N, ⌊H/kh⌋, ⌊W/kw⌋, C').
    Off a GPU this is the reference where a gradient is wanted, otherwise one matrix product on copied patches.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    values = wants_values(image)
    parameters = (weight, bias, ln_weight, ln_bias)
    dtype = check_stem(values, image, *parameters)
    path = backend.select(image.device, dtype)
    if path == "triton" or (path == "aten" and values):
        return _implementation(path, values).patchify_stem_fwd(image, *parameters, eps, dtype)
    if path == "aten" and dtype == torch.float32 and _compiles_for_values(image, *parameters):
        return _compiled_step(image, parameters, eps)
    return reference.patchify_stem(image, *parameters, eps)


def check_stem(
    values: bool, image: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor
) -> torch.dtype:
    """As `check_frozen_block`, for `patchify_stem`."""

    def check() -> torch.dtype:
        _check_activation(image, "image")
        _check_patches(image, weight, bias, channels=image.shape[1], size=tuple(image.shape[2:]))
        _check(image, "ln_weight", ln_weight, (weight.shape[0],))
        _check(image, "ln_bias", ln_bias, (weight.shape[0],))
        return _compute_dtype(image, weight=weight)

    return _once(values, check, image, weight, bias, ln_weight, ln_bias)


@torch.fx.wrap
def downsample(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-6
) -> Tensor:
    """The layer between stages: LayerNorm, then a convolution of non-overlapping patches.

    x: (N, H, W, C); weight: (C', C, kh, kw). Returns (N, ⌊H/kh⌋, ⌊W/kw⌋, C').
    Off a GPU this is the reference, two calls without a copy, but that for backward x alone is saved.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    _check_activation(x, "x")
    _check_patches(x, weight, bias, channels=x.shape[3], size=tuple(x.shape[1:3]))
    _check(x, "ln_weight", ln_weight, (x.shape[3],))
    _check(x, "ln_bias", ln_bias, (x.shape[3],))
    dtype = _compute_dtype(x, weight=weight)
    path = backend.select(x.device, dtype)
    if path == "aten" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return Downsample.apply(x, ln_weight, ln_bias, weight, bias, eps, dtype)
    if path != "triton":
        return reference.downsample(x, ln_weight, ln_bias, weight, bias, eps)
    return _implementation("triton", wants_values(x)).downsample_fwd(
        x.contiguous(), ln_weight, ln_bias, weight, bias, eps, dtype
    )


@torch.fx.wrap
def frozen_downsample(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """`downsample` on what `folding.freeze_downsample` made of its parameters.

    x: (N, H, W, C); weight: (C', C, kh, kw); bias: (C',). Returns (N, ⌊H/kh⌋, ⌊W/kw⌋, C'). Where a gradient is wanted,
    or autocast asks for another dtype than that of ``weight``, this is `downsample` with this weight.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    values = wants_values(x)
    dtype = check_frozen_downsample(values, x, weight, bias)
    path = backend.select(x.device, dtype)
    if path == "aten" and dtype == weight.dtype == torch.float32 and _compiles_for_values(x, weight, bias):
        return _compiled_step(x, (weight, bias), eps)
    serves = path == "triton" or (path == "aten" and values)
    if weight.dtype != dtype or _wants_gradient(x, weight, bias) or not serves:
        return downsample(x, *_affine(x, None, None), weight, bias.to(weight.dtype), eps=eps)
    return _implementation(path, values).frozen_downsample_fwd(x.contiguous(), weight, bias, eps, dtype)


def check_frozen_downsample(values: bool, x: Tensor, weight: Tensor, bias: Tensor) -> torch.dtype:
    """As `check_frozen_block`, for `frozen_downsample`."""

    def check() -> torch.dtype:
        _check_activation(x, "x")
        _check_patches(x, weight, bias, channels=x.shape[3], size=tuple(x.shape[1:3]))
        return _compute_dtype(x, weight=weight)

    return _once(values, check, x, weight, bias)


def _compiled_step(x: Tensor, weights: tuple[Tensor | None, ...], eps: float) -> Tensor:
    """A step of `steps` in a compiler's graph."""
    from .frozen_ops import frozen_steps

    return frozen_steps(x, list(weights), [len(weights)], [eps], "", [0])[0]


def _implementation(path: backend.Backend, values: bool) -> ModuleType:
    """The operators; where only ``values`` are wanted, the functions that they would call.

    An operator's machinery costs up to 0.1 ms a call, and loading it imports PyTorch's compiler, a second.
    """
    if values:
        if path == "aten":
            from . import aten

            return aten
        from . import device

        return device
    from . import operators

    return operators


def wants_values(x: Tensor) -> bool:
    """Whether a call on x is asked for its value alone, and nothing looks on."""
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and not backend.autocasts(x)
        and not torch.jit.is_tracing()
        and backend.is_plain(x)
    )


def _compiles_for_values(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a compiler traces a call on x, in x's dtype, that needs no gradient."""
    return torch.compiler.is_compiling() and not backend.autocasts(x) and not _wants_gradient(x, *weights)


_PASSED: set[tuple] = set()
"""Descriptions of arguments that passed all checks of a call that only wants values: they are not checked again, which
for a small image on a CPU takes as long as a convolution."""


def _once(values: bool, check: Callable[[], torch.dtype], x: Tensor, *weights: Tensor | None) -> torch.dtype:
    """What ``check`` says of tensors, asked once for such; ``values``: what `wants_values` says of x."""
    if not values:
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


def _check_activation(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: expected a tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: expected a floating dtype")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected 4 dimensions, all but the first at least 1")


def _check(x: Tensor, name: str, value: Tensor | None, shape: tuple[int, ...], optional: bool = False) -> None:
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


def _rows_of(weight: Tensor, name: str) -> int:
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        what = f"has shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"is a {type(weight).__name__}"
        raise ValueError(f"{name} {what}: expected a matrix (K, C)")
    return weight.shape[0]


def _check_dwconv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    side = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 4 else 7
    if side not in (3, 5, 7):
        raise ValueError(f"the depthwise kernel is {tuple(weight.shape)}: expected a square one of side 3, 5 or 7")
    _check(x, "the depthwise weight", weight, (x.shape[3], 1, side, side))
    _check(x, "the depthwise bias", bias, (x.shape[3],), optional=True)


def _check_patches(x: Tensor, weight: Tensor, bias: Tensor | None, channels: int, size: tuple[int, int]) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        what = f"has shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"is a {type(weight).__name__}"
        raise ValueError(f"the patch weight {what}: expected (C', C, kh, kw)")
    _check(x, "the patch weight", weight, (weight.shape[0], channels, *weight.shape[2:]))
    _check(x, "the patch bias", bias, (weight.shape[0],), optional=True)
    if size[0] < weight.shape[2] or size[1] < weight.shape[3]:
        raise ValueError(f"the image is {size[0]}×{size[1]}: expected at least one patch of {tuple(weight.shape[2:])}")


def _check_mlp(
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
    _check(x, "w1", w1, (hidden, channels))
    _check(x, "b1", b1, (hidden,))
    _check(x, "w2", w2, (channels, hidden))
    _check(x, "b2", b2, (channels,))
    _check(x, "gamma", gamma, (channels,), optional=True)
    _check(x, "drop_scale", drop_scale, (x.shape[0],), optional=True)


def _check_options(act: str, recompute: int) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}: expected one of {', '.join(ACTIVATIONS)}")
    if recompute not in (0, 1, 2):
        raise ValueError(f"recompute is {recompute!r}: expected 0, 1 or 2")


def _compute_dtype(x: Tensor, **weights: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, otherwise x's own."""
    if backend.autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    for name, weight in weights.items():
        if weight.dtype != x.dtype:
            raise TypeError(
                f"the activations are {x.dtype} but {name} is {weight.dtype}: convert one, or use torch.autocast"
            )
    return x.dtype


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _affine(x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """LayerNorm's affine where it is folded away: the identity."""
    channels = x.shape[3]
    ones = x.new_ones(channels) if ln_weight is None else ln_weight
    return ones, x.new_zeros(channels) if ln_bias is None else ln_bias
