"""The forward of a fused block or patch layer: the host's live parameters, the host's stochastic depth, our ops."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from .. import ops
from ..backends import reference
from ..models.layer_changes import follow
from ..ops import call
from ..ops.views import as_nchw
from .find_blocks import Plan
from .find_patch_layers import PatchPlan


def run(module: nn.Module, plan: Plan | PatchPlan, x: Tensor, fused: bool = True) -> Tensor:
    """What ``module`` computes by its ``plan``, with the fused ops or by the plain reference.

    x and the result: (N, C, H, W); the result lies in memory as channels_last.
    """
    return _run_block(module, plan, x, fused) if isinstance(plan, Plan) else _run_patches(module, plan, x, fused)


def _run_patches(runner: nn.Module, plan: PatchPlan, x: Tensor, fused: bool) -> Tensor:
    norm, conv = follow(runner, plan.norm), follow(runner, plan.conv)
    layer = patchify_stem if plan.stem else downsample
    x = layer(x, (norm.weight, norm.bias), (conv.weight, conv.bias), plan.eps, fused)
    for module in () if plan.following is None else follow(runner, plan.following):
        x = module(x)
    return x


def _run_block(block: nn.Module, plan: Plan, x: Tensor, fused: bool) -> Tensor:
    dwconv, norm = follow(block, plan.dwconv), follow(block, plan.norm)
    gamma = None if plan.gamma is None else getattr(block, plan.gamma).reshape(-1)
    if plan.tail:
        n = dwconv_layernorm(x, (dwconv.weight, dwconv.bias, norm.weight, norm.bias), plan.eps, fused)
        return x + _tail(block, plan, n, gamma)
    fc1, fc2 = follow(block, plan.fc1), follow(block, plan.fc2)
    w1, w2 = fc1.weight, fc2.weight
    if plan.channels_first:
        w1, w2 = w1.flatten(1), w2.flatten(1)
    parameters = (dwconv.weight, dwconv.bias, norm.weight, norm.bias, w1, fc1.bias, w2, fc2.bias, gamma)
    scale = _drop_scale(block, plan, x, gamma)
    return convnext_block(x, parameters, scale, plan.eps, plan.act, plan.recompute, fused)


def _tail(block: nn.Module, plan: Plan, n: Tensor, gamma: Tensor | None) -> Tensor:
    """The residual branch from the norm on, by the host's own layers. n: (N, H, W, C); the result: (N, C, H, W)."""
    z = n.permute(0, 3, 1, 2) if plan.channels_first else n
    for path in plan.tail:
        z = follow(block, path)(z)
    if not plan.channels_first:
        z = z.permute(0, 3, 1, 2)
    if gamma is not None:
        z = z * gamma.view(-1, 1, 1)
    return z if plan.drop_path is None else follow(block, plan.drop_path)(z)


def _drop_scale(block: nn.Module, plan: Plan, x: Tensor, gamma: Tensor | None) -> Tensor | None:
    """The factor of each sample, (N,), as the host's own stochastic depth draws it."""
    if plan.drop_path is None:
        return None
    drop_path = follow(block, plan.drop_path)
    if not drop_path.training or getattr(drop_path, plan.rate) == 0:
        return None
    return drop_path(branch_ones(x, gamma)).flatten()


# `torch.fx` does not trace into the functions below, which ask for dtypes and shapes that its proxies do not have.


@torch.fx.wrap
def branch_ones(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Ones (N, 1, 1, 1) in the dtype of the host's residual branch, the one in which it draws."""
    dtype = torch.get_autocast_dtype(x.device.type) if call.autocasts(x) else x.dtype
    if gamma is not None:
        dtype = torch.promote_types(dtype, gamma.dtype)
    return x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype)


@torch.fx.wrap
def convnext_block(
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    scale: Tensor | None,
    eps: float,
    act: str,
    recompute: int,
    fused: bool,
) -> Tensor:
    """`ops.convnext_block` or `reference.convnext_block` on (N, C, H, W)."""
    args = (x.permute(0, 2, 3, 1), *parameters, scale)
    if fused:
        y = ops.convnext_block(*args, eps=eps, act=act, recompute=recompute)
    else:
        y = reference.convnext_block(*args, eps=eps, act=act)
    return as_nchw(y)


@torch.fx.wrap
def dwconv_layernorm(x: Tensor, parameters: tuple[Tensor | None, ...], eps: float, fused: bool) -> Tensor:
    """`ops.dwconv_layernorm` or `reference.dwconv_layernorm`, (N, C, H, W) to (N, H, W, C)."""
    function = ops.dwconv_layernorm if fused else reference.dwconv_layernorm
    return function(x.permute(0, 2, 3, 1), *parameters, eps=eps)


@torch.fx.wrap
def patchify_stem(
    image: Tensor, norm: tuple[Tensor, Tensor], conv: tuple[Tensor, Tensor | None], eps: float, fused: bool
) -> Tensor:
    """`ops.patchify_stem` or `reference.patchify_stem`, (N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋)."""
    if image.dim() == 4 and image.shape[1] != conv[0].shape[1]:
        raise ValueError(f"the image has {image.shape[1]} channels: expected {conv[0].shape[1]}")
    function = ops.patchify_stem if fused else reference.patchify_stem
    y = as_nchw(function(image, *conv, *norm, eps=eps))
    # Autocast has LayerNorm, and with it the host's residual stream, in float32 on every device but a CPU.
    return y.float() if call.autocasts(image) and image.device.type != "cpu" else y


@torch.fx.wrap
def downsample(
    x: Tensor, norm: tuple[Tensor, Tensor], conv: tuple[Tensor, Tensor | None], eps: float, fused: bool
) -> Tensor:
    """`ops.downsample` or `reference.downsample`, (N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋)."""
    function = ops.downsample if fused else reference.downsample
    return as_nchw(function(x.permute(0, 2, 3, 1), *norm, *conv, eps=eps))
