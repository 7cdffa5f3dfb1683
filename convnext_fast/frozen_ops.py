"""What a compiled frozen model calls on a CPU: the stem, a downsampling layer, and all blocks of a stage.

An operator of `torch.library.custom_op` takes 0.1 ms and more a call, for it prepares for gradients, too. These have
none, and are registered with the dispatcher directly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import aten, compiled, onednn
from .folding import FrozenBlock
from .prepared import prepared

_LIBRARY = torch.library.Library("convnext_fast", "FRAGMENT")


def _operator(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``convnext_fast::<name>_cpu`` with the function's schema."""
    name = f"{function.__name__}_cpu"
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CPU")
    return getattr(torch.ops.convnext_fast, name)


def _fake(operator: Callable[..., Tensor]) -> Callable[[Callable], Callable]:
    return torch.library.register_fake(operator._qualified_op_name, lib=_LIBRARY)


@_operator
def frozen_blocks(x: Tensor, weights: list[Tensor], eps: list[float], act: str) -> Tensor:
    """x (N, H, W, C) through blocks of which ``weights`` holds what `folding.FrozenBlock` does, one after another.

    An absent bias is an empty tensor.
    """
    fields = len(FrozenBlock._fields)
    blocks = [
        tuple(weight if weight.numel() else None for weight in weights[i : i + fields])
        for i in range(0, len(weights), fields)
    ]
    x = x.contiguous()
    if onednn.serves(x):
        chain = [(prepared(x, block, act), e) for block, e in zip(blocks, eps, strict=True)]
        if all(isinstance(kernel, compiled.CompiledBlock) for kernel, _ in chain):
            return compiled.run_chain(chain, x)
    for block, e in zip(blocks, eps, strict=True):
        x = aten.frozen_block_fwd(x, *block, e, act, x.dtype)
    return x


@_fake(frozen_blocks)
def _(x: Tensor, weights: list[Tensor], eps: list[float], act: str) -> Tensor:
    return x.new_empty(x.shape)


@_operator
def frozen_downsample(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `aten.frozen_downsample_fwd`."""
    return aten.frozen_downsample_fwd(x.contiguous(), weight, bias, eps, x.dtype)


@_fake(frozen_downsample)
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // weight.shape[2], x.shape[2] // weight.shape[3], weight.shape[0])


@_operator
def stem(image: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, eps: float) -> Tensor:
    """See `aten.patchify_stem_fwd`."""
    return aten.patchify_stem_fwd(image, weight, bias, ln_weight, ln_bias, eps, image.dtype)


@_fake(stem)
def _(image: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, eps: float) -> Tensor:
    height, width = image.shape[2] // weight.shape[2], image.shape[3] // weight.shape[3]
    return image.new_empty(image.shape[0], height, width, weight.shape[0])
