"""Several blocks, one after another, as one node of autograd's graph: on a GPU, where a node costs as much as a kernel.

The gradients of a group's weights are returned together, and what the group saved is freed only after that. So a deep
stage is several groups: DistributedDataParallel sends gradients while those of earlier blocks are computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.interface import Gradients
from ..kernels.weights import BlockWeights, Saved
from . import autograd, call
from .compute import compute
from .views import unlinked

if TYPE_CHECKING:
    from ..backends.gpu import BlockCall

MOST = 9
"""The most blocks in a group: the third stage of ConvNeXt-T, or a third of the third stage of larger models."""

_WEIGHTS = len(BlockWeights._fields)
_KEPT = 1 + len(Saved._fields)
"""How many tensors a block's backward needs besides its weights and drop scale: x, then `Saved`."""


def run(x: Tensor, blocks: tuple[BlockCall, ...], dtype: torch.dtype) -> Tensor:
    """x (N, H, W, C), contiguous, through blocks, by the Triton kernels.

    All tensors are plain (see `call.is_plain`), and none is a negative view; or a compiler traces all of them.
    """
    if torch.compiler.is_compiling():
        from . import block_group_operator  # imported late: it imports PyTorch's compiler

        return block_group_operator.run(x, blocks, dtype)
    if not torch.is_grad_enabled():
        return compute("blocks_fwd", "triton", (x, blocks, dtype))[-1]
    weights = [weight for block in blocks for weight in block[0]]
    return _apply(blocks, dtype, x, *weights, *(block[1] for block in blocks))


class _Blocks(torch.autograd.Function):
    """``apply(blocks, dtype, x, *all weights, *drop scales)``."""

    @staticmethod
    def forward(ctx: Any, blocks: tuple[BlockCall, ...], dtype: torch.dtype, x: Tensor, *tensors: Any) -> Tensor:
        *kept, y = compute("blocks_fwd", "triton", (x, blocks, dtype))
        ctx.options, ctx.dtype = [block[2:] for block in blocks], dtype
        ctx.save_for_backward(*tensors, x, *kept)
        ctx.set_materialize_grads(False)
        return unlinked(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        options, needs, count = ctx.options, ctx.needs_input_grad[2:], len(ctx.options)
        nothing = (None,) * (3 + _WEIGHTS * count + count)
        if dy is None:
            return nothing
        autograd.refuse_batches(dy)
        saved, scales = ctx.saved_tensors, _WEIGHTS * count
        blocks, wanted, inputs, own = [], [], [], []
        for i, option in enumerate(options):
            at, kept = _WEIGHTS * i, scales + count + _KEPT * i
            if not any(needs[: 1 + at + _WEIGHTS]):  # neither this block nor anything before it needs a gradient
                continue
            wanted.append((any(needs[: 1 + at]), needs[1 + at] or needs[2 + at]))
            blocks.append((BlockWeights._make(saved[at : at + _WEIGHTS]), saved[scales + i], *option))
            inputs.append(saved[kept])
            own.append(Saved._make(saved[kept + 1 : kept + _KEPT]))
        arguments = tuple(inputs), tuple(blocks), tuple(own), tuple(wanted), ctx.dtype
        dx, *gradients = _backward(dy.contiguous(), *arguments)
        absent = _WEIGHTS * (count - len(blocks))
        return None, None, dx, *nothing[:absent], *gradients, *nothing[:count]


def _backward(
    dy: Tensor, inputs: tuple, blocks: tuple, saved: tuple, needs: tuple, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    if call.is_plain(dy) and not dy.is_neg() and not torch.is_grad_enabled():
        return compute("blocks_bwd", "triton", (dy, inputs, blocks, saved, needs, dtype))
    gradients: list[Tensor | None] = []
    for x, block, own, wanted in zip(*map(reversed, (inputs, blocks, saved, needs)), strict=True):
        weights, drop_scale, eps, act, _ = block
        x = x if x is inputs[0] else x.to(dy.dtype)  # saved in the compute dtype; the block's input had dy's
        dy, *grads = call.run("block_bwd", "triton", dy, x, own, weights, drop_scale, eps, act, dtype, *wanted)
        gradients = grads + gradients
    return (dy, *gradients)


# Skips what `Function.apply` does for the transforms of `torch.func`: these run the reference.
_apply = super(torch.autograd.Function, _Blocks).apply
