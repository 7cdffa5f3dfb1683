"""The fused ops as PyTorch operators: the only door between the models and the device code.

`convnext_block`, `dwconv_layernorm` and `pointwise_mlp` validate their arguments, choose the path for the device
(see `backend`), and are differentiable, traceable (`torch.compile`, `torch.export`) and aware of autocast. Under
autocast they compute in its dtype and keep the residual stream and the gradients of parameters in the dtypes that eager
PyTorch would give them. Activations are (N, H, W, C) and must be contiguous in memory for speed; any strides work.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..backends import choose, reference
from .arguments import (
    check_activation,
    check_dwconv,
    check_frozen_block,
    check_frozen_downsample,
    check_mlp,
    check_options,
    check_patches,
    check_stem,
    check_tensor,
    compute_dtype,
    rows_of,
)
from .call import compiles_for_values, wants_gradient, wants_values
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
    check_activation(x, "x")
    channels, hidden = x.shape[3], rows_of(w1, "w1")
    check_dwconv(x, dwconv_weight, dwconv_bias)
    check_tensor(x, "ln_weight", ln_weight, (channels,), optional=True)
    check_tensor(x, "ln_bias", ln_bias, (channels,), optional=True)
    check_mlp(x, w1, b1, w2, b2, gamma, drop_scale, channels, hidden)
    check_options(act, recompute)
    dtype = compute_dtype(x, dwconv_weight=dwconv_weight, w1=w1, w2=w2)
    if gamma is not None:
        x = x.to(torch.promote_types(x.dtype, gamma.dtype))
    path = choose.select(x.device, dtype)
    if path == "reference":
        ln_weight, ln_bias = _affine(x, ln_weight, ln_bias)
        return reference.convnext_block(
            x, dwconv_weight, dwconv_bias, ln_weight, ln_bias, w1, b1, w2, b2, gamma, drop_scale, eps, act
        )
    if not torch.is_grad_enabled():
        recompute = 2
    args = (dwconv_weight, dwconv_bias, ln_weight, ln_bias, w1, b1, w2, b2, gamma, drop_scale)
    return _implementation(path, wants_values(x)).block_fwd(x.contiguous(), *args, eps, act, recompute, dtype)[0]


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
    check_options(act, 2)
    tensors = (x, dwconv_weight, dwconv_bias, w1, b1, w2, b2)
    values = wants_values(x)
    dtype = check_frozen_block(values, *tensors)
    path = choose.select(x.device, dtype)
    if w1.dtype != dtype or wants_gradient(*tensors) or path == "reference":
        mlp = (w1, b1[0].to(w1.dtype), w2, b2.to(w1.dtype))
        return convnext_block(x, dwconv_weight, dwconv_bias, None, None, *mlp, eps=eps, act=act)
    return _implementation(path, values).frozen_block_fwd(x.contiguous(), *tensors[1:], eps, act, dtype)


def dwconv_layernorm(
    x: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """LayerNorm(dwconv(x)) over the channels. x and the result: (N, H, W, C); parameters as in `convnext_block`.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    check_activation(x, "x")
    check_dwconv(x, weight, bias)
    check_tensor(x, "ln_weight", ln_weight, (x.shape[3],))
    check_tensor(x, "ln_bias", ln_bias, (x.shape[3],))
    dtype = compute_dtype(x, weight=weight)
    path = choose.select(x.device, dtype)
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
    check_activation(x, "x")
    if residual is not None:
        check_tensor(x, "residual", residual, tuple(x.shape))
    check_mlp(x, w1, b1, w2, b2, gamma, drop_scale, x.shape[3], rows_of(w1, "w1"))
    check_options(act, recompute)
    dtype = compute_dtype(x, w1=w1, w2=w2)
    path = choose.select(x.device, dtype)
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
    path = choose.select(image.device, dtype)
    if path == "triton" or (path == "aten" and values):
        return _implementation(path, values).patchify_stem_fwd(image, *parameters, eps, dtype)
    if path == "aten" and dtype == torch.float32 and compiles_for_values(image, *parameters):
        return _compiled_step(image, parameters, eps)
    return reference.patchify_stem(image, *parameters, eps)


def downsample(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-6
) -> Tensor:
    """The layer between stages: LayerNorm, then a convolution of non-overlapping patches.

    x: (N, H, W, C); weight: (C', C, kh, kw). Returns (N, ⌊H/kh⌋, ⌊W/kw⌋, C').
    Off a GPU this is the reference, two calls without a copy, but that for backward x alone is saved.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    check_activation(x, "x")
    check_patches(x, weight, bias, channels=x.shape[3], size=tuple(x.shape[1:3]))
    check_tensor(x, "ln_weight", ln_weight, (x.shape[3],))
    check_tensor(x, "ln_bias", ln_bias, (x.shape[3],))
    dtype = compute_dtype(x, weight=weight)
    path = choose.select(x.device, dtype)
    if path == "aten" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return Downsample.apply(x, ln_weight, ln_bias, weight, bias, eps, dtype)
    if path != "triton":
        return reference.downsample(x, ln_weight, ln_bias, weight, bias, eps)
    return _implementation("triton", wants_values(x)).downsample_fwd(
        x.contiguous(), ln_weight, ln_bias, weight, bias, eps, dtype
    )


def frozen_downsample(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """`downsample` on what `folding.freeze_downsample` made of its parameters.

    x: (N, H, W, C); weight: (C', C, kh, kw); bias: (C',). Returns (N, ⌊H/kh⌋, ⌊W/kw⌋, C'). Where a gradient is wanted,
    or autocast asks for another dtype than that of ``weight``, this is `downsample` with this weight.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    values = wants_values(x)
    dtype = check_frozen_downsample(values, x, weight, bias)
    path = choose.select(x.device, dtype)
    if path == "aten" and dtype == weight.dtype == torch.float32 and compiles_for_values(x, weight, bias):
        return _compiled_step(x, (weight, bias), eps)
    serves = path == "triton" or (path == "aten" and values)
    if weight.dtype != dtype or wants_gradient(x, weight, bias) or not serves:
        return downsample(x, *_affine(x, None, None), weight, bias.to(weight.dtype), eps=eps)
    return _implementation(path, values).frozen_downsample_fwd(x.contiguous(), weight, bias, eps, dtype)


def _compiled_step(x: Tensor, weights: tuple[Tensor | None, ...], eps: float) -> Tensor:
    """A step of `steps` in a compiler's graph."""
    from .sequence_operator import frozen_steps

    return frozen_steps(x, list(weights), [len(weights)], [eps], "", [0])[0]


def _implementation(path: choose.Backend, values: bool) -> ModuleType:
    """The operators; where only ``values`` are wanted, the functions that they would call.

    An operator's machinery costs up to 0.1 ms a call, and loading it imports PyTorch's compiler, a second.
    """
    if values:
        if path == "aten":
            from ..backends.cpu import ops as cpu

            return cpu
        from ..backends import gpu

        return gpu
    from . import operators

    return operators


def _affine(x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """LayerNorm's affine where it is folded away: the identity."""
    channels = x.shape[3]
    ones = x.new_ones(channels) if ln_weight is None else ln_weight
    return ones, x.new_zeros(channels) if ln_bias is None else ln_bias
