"""What a module computes by its plan: the ops, or the plain reference, on the live parameters of its layers."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import reference
from ..backends.steps import Kind, Step
from ..kernels.weights import BlockWeights, ConvNorm, NormConv
from ..ops import call, functions
from ..ops.folded_weights import flat_block
from ..ops.views import as_nchw
from .drop_path import DropPath
from .plan import BlockPlan, PatchPlan, follow


class Read(NamedTuple):
    """What a plan reads of its module.

    weights: as in a `steps.Step`; eps: of the LayerNorm.
    """

    weights: ConvNorm | NormConv | BlockWeights
    eps: float


def read(module: nn.Module, plan: BlockPlan | PatchPlan) -> Read:
    """The current weights of the layers of ``module``."""
    norm = follow(module, plan.norm)
    affine = norm.weight, norm.bias
    if isinstance(plan, PatchPlan):
        conv = follow(module, plan.conv)
        patches = conv.weight, conv.bias
        return Read(ConvNorm(*patches, *affine) if plan.stem else NormConv(*affine, *patches), norm.eps)
    dwconv = follow(module, plan.dwconv)
    gamma = None if plan.gamma is None else getattr(module, plan.gamma)
    fc1, fc2 = follow(module, plan.fc1), follow(module, plan.fc2)
    linear, grn = (fc1.weight, fc1.bias, fc2.weight, fc2.bias), (None, None)
    if plan.grn is not None:
        layer, (weight, bias) = follow(module, plan.grn), plan.grn_names
        grn = getattr(layer, weight), getattr(layer, bias)
    return Read(BlockWeights(dwconv.weight, dwconv.bias, *affine, *linear, gamma, *grn), norm.eps)


def step_of(module: nn.Module, plan: BlockPlan | PatchPlan, found: Read, token: Tensor | None) -> Step:
    """The step that computes what the plan computes."""
    if isinstance(plan, PatchPlan):
        kind = Kind.STEM if plan.stem else Kind.DOWNSAMPLE
        return Step(kind, found.weights, found.eps, token=None if plan.stem else token)
    # Refers to the drop path only: the module holds the step, so a reference to the module would make a cycle.
    draw = None
    if plan.drop_path is not None:
        draw = functools.partial(drop_scale, follow(module, plan.drop_path), plan.rate, found.weights.gamma)
    return Step(Kind.BLOCK, found.weights, found.eps, plan.act, token, plan.recompute, draw)


def run(module: nn.Module, plan: BlockPlan | PatchPlan, found: Read, x: Tensor, fused: bool = True) -> Tensor:
    """x (N, C, H, W) to (N, C', H', W'), in channels_last memory, by the fused ops or by the plain reference."""
    if isinstance(plan, PatchPlan):
        x = (patchify_stem if plan.stem else downsample)(x, tuple(found.weights), found.eps, fused)
        for following in () if plan.following is None else follow(module, plan.following):
            x = following(x)
        return x
    scale = None
    if plan.drop_path is not None:
        scale = drop_scale(follow(module, plan.drop_path), plan.rate, found.weights.gamma, x)
    return convnext_block(x, tuple(found.weights), scale, found.eps, plan.act, plan.recompute, fused)


def drop_scale(drop_path: nn.Module, rate: str, gamma: Tensor | None, x: Tensor) -> Tensor | None:
    """The factor of each sample of x, (N,), as a block's own stochastic depth draws it.

    rate: the name of the attribute that holds the rate.
    """
    if not drop_path.training or getattr(drop_path, rate) == 0:
        return None
    dtype = call.compute_dtype(x) if gamma is None else torch.promote_types(call.compute_dtype(x), gamma.dtype)
    branch = (x.shape[0], 1, 1, 1)  # with the residual branch's dtype, in which eager draws
    if isinstance(drop_path, DropPath):
        return drop_path.draw(x.new_empty(branch, dtype=dtype))
    return drop_path(x.new_ones(branch, dtype=dtype)).flatten()


def convnext_block(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    scale: Tensor | None,
    eps: float,
    act: str,
    recompute: int,
    fused: bool,
) -> Tensor:
    """`functions.block` or `reference.convnext_block` on (N, C, H, W); weights: `BlockWeights`."""
    block, x = flat_block(BlockWeights(*weights)), x.permute(0, 2, 3, 1)
    if fused:
        return as_nchw(functions.block(x, block, scale, eps, act, recompute))
    *plain, grn_weight, grn_bias = block
    return as_nchw(reference.convnext_block(x, *plain, scale, eps, act, grn_weight, grn_bias))


def patchify_stem(image: Tensor, weights: tuple[Tensor | None, ...], eps: float, fused: bool) -> Tensor:
    """`ops.patchify_stem` or `reference.patchify_stem`, (N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋)."""
    channels = weights[0].shape[1]
    if image.dim() == 4 and image.shape[1] != channels:
        raise ValueError(f"the image has {image.shape[1]} channels: expected {channels}")
    function = ops.patchify_stem if fused else reference.patchify_stem
    y = as_nchw(function(image, *weights, eps=eps))
    # Autocast runs LayerNorm in float32 on every device but a CPU, so the residual stream is float32, too.
    return y.float() if call.autocasts(image) and image.device.type != "cpu" else y


def downsample(x: Tensor, weights: tuple[Tensor | None, ...], eps: float, fused: bool) -> Tensor:
    """`ops.downsample` or `reference.downsample`, (N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋)."""
    function = ops.downsample if fused else reference.downsample
    return as_nchw(function(x.permute(0, 2, 3, 1), *weights, eps=eps))
