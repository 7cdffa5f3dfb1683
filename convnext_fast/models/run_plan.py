"""What a module computes by its plan: the ops, or the plain formula, on the live parameters of its layers."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from .. import ops
from ..backends import reference
from ..backends.steps import WEIGHTS, Kind, Step
from ..kernels.weights import BlockWeights
from ..ops import call
from ..ops.views import as_nchw
from .drop_path import DropPath
from .plan import BlockPlan, PatchPlan, follow


class Read(NamedTuple):
    """What a plan reads of its module.

    weights: of `ops.patchify_stem`, `ops.downsample` or `ops.convnext_block` in their order (see `steps.Step`), of a
    block that is fused in part those of `ops.dwconv_layernorm` and γ; eps: of the LayerNorm.
    """

    weights: tuple[Tensor | None, ...]
    eps: float


def read(module: nn.Module, plan: BlockPlan | PatchPlan) -> Read:
    """The weights that the layers of ``module`` have now."""
    norm = follow(module, plan.norm)
    affine = norm.weight, norm.bias
    if isinstance(plan, PatchPlan):
        conv = follow(module, plan.conv)
        patches = conv.weight, conv.bias
        return Read((*patches, *affine) if plan.stem else (*affine, *patches), norm.eps)
    dwconv = follow(module, plan.dwconv)
    gamma = None if plan.gamma is None else getattr(module, plan.gamma)
    weights = (dwconv.weight, dwconv.bias, *affine)
    if not plan.tail:
        fc1, fc2 = follow(module, plan.fc1), follow(module, plan.fc2)
        weights += (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return Read((*weights, gamma), norm.eps)


def step_of(module: nn.Module, plan: BlockPlan | PatchPlan, found: Read, token: Tensor | None) -> Step | None:
    """The step that does the same; None for a block that is fused in part."""
    if isinstance(plan, PatchPlan):
        kind = Kind.STEM if plan.stem else Kind.DOWNSAMPLE
        return Step(kind, WEIGHTS[kind](*found.weights), found.eps, token=None if plan.stem else token)
    if plan.tail:
        return None
    # The drop path alone, for a reference to the module would make a cycle: it holds the step.
    draw = None
    if plan.drop_path is not None:
        draw = functools.partial(drop_scale, follow(module, plan.drop_path), plan.rate, found.weights[-1])
    return Step(Kind.BLOCK, BlockWeights(*found.weights), found.eps, plan.act, token, plan.recompute, draw)


def run(module: nn.Module, plan: BlockPlan | PatchPlan, found: Read, x: Tensor, fused: bool = True) -> Tensor:
    """x (N, C, H, W) to (N, C', H', W'), in channels_last memory, by the fused ops or by the plain reference."""
    if isinstance(plan, PatchPlan):
        x = (patchify_stem if plan.stem else downsample)(x, found.weights, found.eps, fused)
        return run_following(module, plan, x)
    gamma = found.weights[-1]
    if plan.tail:
        n = dwconv_layernorm(x, found.weights[:-1], found.eps, fused)
        return x + _tail(module, plan, n, gamma)
    scale = None if plan.drop_path is None else drop_scale(follow(module, plan.drop_path), plan.rate, gamma, x)
    return convnext_block(x, found.weights, scale, found.eps, plan.act, plan.recompute, fused)


def run_following(module: nn.Module, plan: PatchPlan, x: Tensor) -> Tensor:
    """What ``module`` calls after its pair of layers."""
    for following in () if plan.following is None else follow(module, plan.following):
        x = following(x)
    return x


def _tail(block: nn.Module, plan: BlockPlan, n: Tensor, gamma: Tensor | None) -> Tensor:
    """The residual branch from the norm on, by the block's own layers. n: (N, H, W, C); the result: (N, C, H, W)."""
    z = n.permute(0, 3, 1, 2) if plan.channels_first else n
    for path in plan.tail:
        z = follow(block, path)(z)
    if not plan.channels_first:
        z = z.permute(0, 3, 1, 2)
    if gamma is not None:
        z = z * gamma.reshape(-1, 1, 1)
    return z if plan.drop_path is None else follow(block, plan.drop_path)(z)


def drop_scale(drop_path: nn.Module, rate: str, gamma: Tensor | None, x: Tensor) -> Tensor | None:
    """The factor of each sample of x, (N,), as a block's own stochastic depth draws it.

    rate: the name of the attribute that has its rate.
    """
    if not drop_path.training or getattr(drop_path, rate) == 0:
        return None
    if isinstance(drop_path, DropPath):
        return drop_path.draw(x)
    return drop_path(branch_ones(x, gamma)).flatten()


# `torch.fx` does not trace into the functions below, which ask for dtypes and shapes that its proxies do not have.


@torch.fx.wrap
def branch_ones(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Ones (N, 1, 1, 1) in the dtype of the residual branch, the one in which a host draws."""
    dtype = torch.get_autocast_dtype(x.device.type) if call.autocasts(x) else x.dtype
    if gamma is not None:
        dtype = torch.promote_types(dtype, gamma.dtype)
    return x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype)


@torch.fx.wrap
def convnext_block(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    scale: Tensor | None,
    eps: float,
    act: str,
    recompute: int,
    fused: bool,
) -> Tensor:
    """`ops.convnext_block` or `reference.convnext_block` on (N, C, H, W)."""
    *others, w1, b1, w2, b2, gamma = weights
    if w1.dim() == 4:
        w1, w2 = w1.flatten(1), w2.flatten(1)
    if gamma is not None and gamma.dim() != 1:
        gamma = gamma.reshape(-1)
    args = (x.permute(0, 2, 3, 1), *others, w1, b1, w2, b2, gamma, scale)
    if fused:
        y = ops.convnext_block(*args, eps=eps, act=act, recompute=recompute)
    else:
        y = reference.convnext_block(*args, eps=eps, act=act)
    return as_nchw(y)


@torch.fx.wrap
def dwconv_layernorm(x: Tensor, weights: tuple[Tensor | None, ...], eps: float, fused: bool) -> Tensor:
    """`ops.dwconv_layernorm` or `reference.dwconv_layernorm`, (N, C, H, W) to (N, H, W, C)."""
    function = ops.dwconv_layernorm if fused else reference.dwconv_layernorm
    return function(x.permute(0, 2, 3, 1), *weights, eps=eps)


@torch.fx.wrap
def patchify_stem(image: Tensor, weights: tuple[Tensor | None, ...], eps: float, fused: bool) -> Tensor:
    """`ops.patchify_stem` or `reference.patchify_stem`, (N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋)."""
    channels = weights[0].shape[1]
    if image.dim() == 4 and image.shape[1] != channels:
        raise ValueError(f"the image has {image.shape[1]} channels: expected {channels}")
    function = ops.patchify_stem if fused else reference.patchify_stem
    y = as_nchw(function(image, *weights, eps=eps))
    # Autocast has LayerNorm, and with it the residual stream, in float32 on every device but a CPU.
    return y.float() if call.autocasts(image) and image.device.type != "cpu" else y


@torch.fx.wrap
def downsample(x: Tensor, weights: tuple[Tensor | None, ...], eps: float, fused: bool) -> Tensor:
    """`ops.downsample` or `reference.downsample`, (N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋)."""
    function = ops.downsample if fused else reference.downsample
    return as_nchw(function(x.permute(0, 2, 3, 1), *weights, eps=eps))
