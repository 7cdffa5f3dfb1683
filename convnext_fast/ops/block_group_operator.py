"""`block_group` in a compiler's graph: several blocks as one operator forward and one backward, on NVIDIA's GPUs.

Only what is there is given and returned, for an operator takes and makes no absent tensors in its lists. ``masks`` says
which of a block's weights and drop scale are given: bit i for the i-th. ``acts``: the activations, with commas between.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import choose
from ..kernels.weights import BlockWeights, Saved
from . import autograd

if TYPE_CHECKING:
    from ..backends.gpu import BlockCall

_LIBRARY = torch.library.Library("convnext_fast", "FRAGMENT")
_WEIGHTS = len(BlockWeights._fields)
_KEPT = {0: 3, 1: 2, 2: 0}
"""How many of `Saved` a block keeps, by its level of ``recompute``."""


def run(x: Tensor, blocks: tuple[BlockCall, ...], dtype: torch.dtype) -> Tensor:
    """As `block_group.run`."""
    every = [(*weights, scale) for weights, scale, *_ in blocks]
    masks = [sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None) for tensors in every]
    given = [tensor for tensors in every for tensor in tensors if tensor is not None]
    acts = ",".join(block[3] for block in blocks)
    return _FORWARD(x, given, masks, [block[2] for block in blocks], acts, [block[4] for block in blocks], dtype)[-1]


def _forward(
    x: Tensor,
    tensors: list[Tensor],
    masks: list[int],
    eps: list[float],
    acts: str,
    levels: list[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """What each block keeps, and its y, in the blocks' order."""
    results = choose.module("triton").blocks_fwd(x, _blocks(tensors, masks, eps, acts, levels), dtype)
    return [tensor for tensor in results if tensor is not None]


def _backward(
    dy: Tensor,
    x: Tensor,
    tensors: list[Tensor],
    results: list[Tensor],
    masks: list[int],
    eps: list[float],
    acts: str,
    levels: list[int],
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """The gradient of x, if that is needed, then those of the weights.

    results: those of `_forward` but the last. needs: of x and of each of ``tensors``.
    """
    rest, inputs, saved = iter(results), [x], []
    for level in levels:
        kept = [next(rest) for _ in range(_KEPT[level])]
        saved.append(Saved(*kept, *[None] * (len(Saved._fields) - len(kept))))
        inputs.append(next(rest, None))  # the last y is no input
    first, wanted = _wanted(masks, needs)
    arguments = inputs[first:-1], _blocks(tensors, masks, eps, acts, levels)[first:], saved[first:], wanted
    gradients = choose.module("triton").blocks_bwd(dy, *map(tuple, arguments), dtype)
    return [tensor for tensor in gradients if tensor is not None]


def _cut(values: Iterable[Any], masks: list[int]) -> list[list[Any]]:
    """For each block what is given of its weights and its drop scale, None for what is not."""
    rest = iter(values)
    return [[next(rest) if mask >> i & 1 else None for i in range(_WEIGHTS + 1)] for mask in masks]


def _blocks(
    tensors: list[Tensor], masks: list[int], eps: list[float], acts: str, levels: list[int]
) -> tuple[BlockCall, ...]:
    options = zip(_cut(tensors, masks), eps, acts.split(","), levels, strict=True)
    return tuple((BlockWeights._make(own[:-1]), own[-1], *rest) for own, *rest in options)


def _wanted(masks: list[int], needs: list[bool]) -> tuple[int, list[tuple[bool, bool]]]:
    """The first block that takes a gradient, and from there on ``needs_x`` and ``needs_dwconv`` of each."""
    first, before, wanted = 0, needs[0], []
    for own in _cut(needs[1:], masks):
        if before or any(own[:-1]):
            wanted.append((before, bool(own[0] or own[1])))
            before = True
        else:
            first += 1
    return first, wanted


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, tensors, *ctx.options = inputs
    ctx.save_for_backward(x, *tensors, *output[:-1])
    ctx.count = len(tensors)
    ctx.mark_non_differentiable(*output[:-1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    masks, dy = ctx.options[0], grads[-1]
    if dy is None:
        return None, [None] * ctx.count, *[None] * len(ctx.options)
    autograd.refuse_batches(dy)
    x, *saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    found = iter(_BACKWARD(dy.contiguous(), x, saved[: ctx.count], saved[ctx.count :], *ctx.options, needs))
    first, wanted = _wanted(masks, needs)
    dx = next(found) if needs[0] else None
    gradients: list[Tensor | None] = []
    for number, mask in enumerate(masks):
        for i in range(_WEIGHTS + 1):
            if mask >> i & 1:
                absent = number < first or i == _WEIGHTS or (i < 2 and not wanted[number - first][1])
                gradients.append(None if absent else next(found))
    return dx, gradients, *[None] * len(ctx.options)


def _register(name: str, function: Any, backward: Any, save: Any = None) -> Any:
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"convnext_fast::{name}", function, lib=_LIBRARY)
    torch.library.register_autograd(f"convnext_fast::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.convnext_fast, name)


_FORWARD = _register("blocks_fwd_gpu", _forward, _gradients, _save)
_BACKWARD = _register("blocks_bwd_gpu", _backward, autograd.no_second_derivative)
