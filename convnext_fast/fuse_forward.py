"""The forward of a fused block: the host's live parameters, the host's stochastic depth, our ops."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from . import ops, reference
from .fuse_hosts import Plan, follow


def run(block: nn.Module, plan: Plan, x: Tensor, fused: bool = True) -> Tensor:
    """What ``block`` computes by its ``plan``, with the fused ops or by the plain reference.

    x and the result: (N, C, H, W); the result lies in memory as channels_last.
    """
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
    return convnext_block(x, parameters, scale, plan.eps, plan.act, fused)


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
    dtype = torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype
    if gamma is not None:
        dtype = torch.promote_types(dtype, gamma.dtype)
    return x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype)


@torch.fx.wrap
def convnext_block(
    x: Tensor, parameters: tuple[Tensor | None, ...], scale: Tensor | None, eps: float, act: str, fused: bool
) -> Tensor:
    """`ops.convnext_block` or `reference.convnext_block` on (N, C, H, W)."""
    block = ops.convnext_block if fused else reference.convnext_block
    return block(x.permute(0, 2, 3, 1), *parameters, scale, eps=eps, act=act).permute(0, 3, 1, 2)


@torch.fx.wrap
def dwconv_layernorm(x: Tensor, parameters: tuple[Tensor | None, ...], eps: float, fused: bool) -> Tensor:
    """`ops.dwconv_layernorm` or `reference.dwconv_layernorm`, (N, C, H, W) to (N, H, W, C)."""
    function = ops.dwconv_layernorm if fused else reference.dwconv_layernorm
    return function(x.permute(0, 2, 3, 1), *parameters, eps=eps)


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
