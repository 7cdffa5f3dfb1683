"""The frozen blocks of a stage as one operator, for compilers on a CPU: a call of an operator takes 0.1 ms and more."""

from __future__ import annotations

import torch
from torch import Tensor

from . import aten, compiled, onednn
from .folding import FrozenBlock
from .prepared import prepared


@torch.library.custom_op("convnext_fast::frozen_blocks_cpu", mutates_args=())
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


@frozen_blocks.register_fake
def _(x: Tensor, weights: list[Tensor], eps: list[float], act: str) -> Tensor:
    return x.new_empty(x.shape)
