"""The fused ops: the only interface between the models and the backends.

All validate their arguments and choose the backend (`backends.choose`). All are traceable (`torch.compile`,
`torch.export`) and aware of autocast; those on plain weights are differentiable. The backward raises
NotImplementedError for second derivatives and for batches of output gradients. Under autocast the ops compute in its
dtype and keep the residual stream and the gradients of parameters in the dtypes that eager PyTorch would give them.
Activations are (N, H, W, C). Any strides work; memory should be contiguous for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose, reference
from ..backends.steps import Kind
from ..kernels.weights import BlockWeights, ConvNorm, FrozenBlock, FrozenDownsample, MlpWeights, NormConv
from . import arguments, call

__all__ = [
    "convnext_block",
    "convnext_v2_block",
    "downsample",
    "dwconv_layernorm",
    "frozen_block",
    "frozen_downsample",
    "global_response_norm",
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
        recompute: what the backward pass recomputes instead of saving. 0 saves x, the convolution's output and the
            hidden activations; 1 does not save the hidden activations; 2 saves only x.

    Returns:
        (N, H, W, C), contiguous.

    Raises:
        TypeError: a tensor has a dtype that is not floating, or differs from x's outside autocast.
        ValueError: a shape, a device or an option is not as above.
    """
    weights = BlockWeights(dwconv_weight, dwconv_bias, ln_weight, ln_bias, w1, b1, w2, b2, gamma)
    return block(x, weights, drop_scale, eps, act, recompute)


def convnext_v2_block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    grn_weight: Tensor,
    grn_bias: Tensor,
    w2: Tensor,
    b2: Tensor,
    drop_scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    act: str = "gelu",
    recompute: int = 1,
) -> Tensor:
    """x + drop_scale · fc2(GRN(act(fc1(LayerNorm(dwconv(x)))))), one block of ConvNeXt V2 (section 3.2 of its paper).

    Args:
        grn_weight, grn_bias: (K,), γ and β of `global_response_norm`, here with its default epsilon.
        x, eps, act, recompute and the other tensors: as in `convnext_block`.

    Returns:
        (N, H, W, C), contiguous.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    weights = BlockWeights(dwconv_weight, dwconv_bias, ln_weight, ln_bias, w1, b1, w2, b2, None, grn_weight, grn_bias)
    if grn_weight is None:
        raise TypeError("grn_weight is None: expected a tensor (K,); a block without it is a convnext_block")
    return block(x, weights, drop_scale, eps, act, recompute)


def block(x: Tensor, weights: BlockWeights, drop_scale: Tensor | None, eps: float, act: str, recompute: int) -> Tensor:
    """`convnext_block` or `convnext_v2_block`, depending on which weights are given."""
    gamma, grn = weights.gamma, (weights.grn_weight, weights.grn_bias)
    dtype = arguments.check_block(x, weights, drop_scale, act, recompute)
    backend = choose.select(x.device, dtype)
    if gamma is not None and backend != "triton":
        x = x.to(torch.promote_types(x.dtype, gamma.dtype))
    if backend == "reference":
        ln_weight, ln_bias = _affine(x, weights.ln_weight, weights.ln_bias)
        weights = weights._replace(ln_weight=ln_weight, ln_bias=ln_bias)
        return reference.convnext_block(x, *weights[:4], *weights.mlp(), drop_scale, eps, act, *grn)
    if not torch.is_grad_enabled():
        recompute = 2
    return call.run("block_fwd", backend, x.contiguous(), weights, drop_scale, eps, act, recompute, dtype)


def frozen_block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    grn_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    act: str = "gelu",
) -> Tensor:
    """`convnext_block` on parameters folded by `folding.freeze_block`, without drop path.

    x: (N, H, W, C); w1, b1, w2, b2, and in ConvNeXt V2 grn_weight: see `weights.FrozenBlock`. If a gradient
    is needed, or autocast has another dtype than ``w1``, this is `convnext_block` with these weights.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    weights = FrozenBlock(dwconv_weight, dwconv_bias, w1, b1, w2, b2, grn_weight)
    dtype = arguments.check_frozen_block(x, weights, act)
    backend = choose.select(x.device, dtype)
    if w1.dtype != dtype or call.wants_gradient(x, *weights) or backend == "reference":
        mlp = (w1, b1[0].to(w1.dtype), w2, b2.to(w1.dtype))
        grn = (None, None) if grn_weight is None else (grn_weight, torch.zeros_like(grn_weight))
        return block(x, BlockWeights(dwconv_weight, dwconv_bias, None, None, *mlp, None, *grn), None, eps, act, 1)
    return call.run("frozen_block_fwd", backend, x.contiguous(), weights, eps, act, dtype)


def dwconv_layernorm(
    x: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """LayerNorm(dwconv(x)) over the channels. x and the result: (N, H, W, C); parameters as in `convnext_block`.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    weights = ConvNorm(weight, bias, ln_weight, ln_bias)
    dtype = arguments.check_dwconv_layernorm(x, weights)
    backend = choose.select(x.device, dtype)
    if backend == "reference":
        return reference.dwconv_layernorm(x, *weights, eps)
    return call.run("dwconv_layernorm_fwd", backend, x.contiguous(), weights, eps, dtype)


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
    weights = MlpWeights(w1, b1, w2, b2, gamma)
    dtype = arguments.check_mlp(x, residual, weights, drop_scale, act, recompute)
    backend = choose.select(x.device, dtype)
    if backend == "reference":
        return reference.pointwise_mlp(x, residual, *weights, drop_scale, act)
    if residual is None:
        x = x.to(dtype)
    else:
        kind = residual.dtype if gamma is None else torch.promote_types(residual.dtype, gamma.dtype)
        residual = residual.to(kind).contiguous()
    if not torch.is_grad_enabled():
        recompute = 2
    given = x.contiguous(), residual, weights, drop_scale, act, recompute, dtype
    y = call.run("pointwise_mlp_fwd", backend, *given)
    return y if residual is not None or gamma is None else y.to(torch.promote_types(y.dtype, gamma.dtype))


def global_response_norm(h: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """weight·h·N + bias + h for N = G/(mean_k G + eps), G the norm of each unit k over the pixels of a sample.

    h and the result: (N, H, W, K); weight, bias: (K,). G is summed in at least float32. This is the reference on every
    backend; `convnext_v2_block` is where the norm is fused.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    arguments.check_norm(h, weight, bias)
    return reference.global_response_norm(h, weight, bias, eps)


def patchify_stem(
    image: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """The stem: convolution of non-overlapping patches, then LayerNorm.

    image: (N, C, H, W), any strides; weight: (C', C, kh, kw). Returns (N, ⌊H/kh⌋, ⌊W/kw⌋, C').
    On a CPU this is the reference if a gradient is needed, otherwise one kernel or one matrix product on copied
    patches.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    weights = ConvNorm(weight, bias, ln_weight, ln_bias)
    dtype = arguments.check_stem(image, weights)
    backend = choose.select(image.device, dtype)
    if backend == "triton" or (backend != "reference" and call.wants_values(image)):
        return call.run("patchify_stem_fwd", backend, image, weights, eps, dtype, dtype)
    on_cpu = backend == "aten" and image.device.type == "cpu"
    if on_cpu and dtype == torch.float32 and call.compiles_for_values(image, *weights):
        from .sequence_operator import frozen_steps  # registers an operator, which imports PyTorch's compiler

        return frozen_steps(image, list(weights), [None], [int(Kind.STEM)], [eps], "", [0])[0]
    return reference.patchify_stem(image, *weights, eps)


def downsample(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-6
) -> Tensor:
    """The layer between stages: LayerNorm, then a convolution of non-overlapping patches.

    x: (N, H, W, C); weight: (C', C, kh, kw). Returns (N, ⌊H/kh⌋, ⌊W/kw⌋, C').
    Except on a GPU this is the reference (two calls, no copy), but autograd saves only x.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    weights = NormConv(ln_weight, ln_bias, weight, bias)
    dtype = arguments.check_downsample(x, weights)
    backend = choose.select(x.device, dtype)
    if backend == "triton":
        return call.run("downsample_fwd", backend, x.contiguous(), weights, eps, dtype)
    if backend == "reference" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return reference.downsample(x, *weights, eps)
    return call.run("downsample_fwd", backend, x, weights, eps, dtype)


def frozen_downsample(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """`downsample` on parameters folded by `folding.freeze_downsample`.

    x: (N, H, W, C); weight: (C', C, kh, kw); bias: (C',). Returns (N, ⌊H/kh⌋, ⌊W/kw⌋, C'). If a gradient is needed,
    or autocast has another dtype than ``weight``, this is `downsample` with these weights.

    Raises:
        TypeError, ValueError: as `convnext_block`.
    """
    weights = FrozenDownsample(weight, bias)
    dtype = arguments.check_frozen_downsample(x, weights)
    backend = choose.select(x.device, dtype)
    takes_values = backend == "triton" or (backend != "reference" and call.wants_values(x))
    if weight.dtype != dtype or call.wants_gradient(x, *weights) or not takes_values:
        return downsample(x, *_affine(x, None, None), weight, bias.to(weight.dtype), eps=eps)
    return call.run("frozen_downsample_fwd", backend, x.contiguous(), weights, eps, dtype)


def _affine(x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """LayerNorm's affine, the identity if it is folded away."""
    channels = x.shape[3]
    ones = x.new_ones(channels) if ln_weight is None else ln_weight
    return ones, x.new_zeros(channels) if ln_bias is None else ln_bias
