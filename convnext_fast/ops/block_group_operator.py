"""`block_group` in a compiler's graph: several blocks as one operator forward and one backward, on NVIDIA's GPUs.

Lists hold only tensors that are present: an operator cannot take or return absent ones in a list. ``masks`` says which
of a block's weights and drop scale are present: bit i for the i-th. ``acts``: the activations, separated by commas.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import choose
from ..kernels.weights import BlockWeights, Saved
from . import autograd
from .compute import as_one_plan

if TYPE_CHECKING:
    from ..backends.gpu import BlockCall

_LIBRARY = torch.library.Library("convnext_fast", "FRAGMENT")
_WEIGHTS = len(BlockWeights._fields)
_KEPT = {0: 3, 1: 2, 2: 0}
"""How many tensors of `Saved` a block keeps, by its level of ``recompute``."""
_ALIGNMENT = 512
"""In bytes; that of CUDA's allocator."""


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
    """For each block, in order: the tensors that it keeps, then its y."""
    return list(as_one_plan(_blocks_fwd)(x, *map(tuple, (tensors, masks, eps)), acts, tuple(levels), dtype))


def _blocks_fwd(x, tensors, masks, eps, acts, levels, dtype) -> tuple[Tensor, ...]:
    results = choose.module("triton").blocks_fwd(x, _blocks(tensors, masks, eps, acts, levels), dtype)
    return tuple(tensor for tensor in results if tensor is not None)


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
    """The gradient of x, if needed, then the memory of the weights' gradients, one tensor per dtype (see `_layout`).

    results: those of `_forward` except the last. needs: whether x, and each of ``tensors``, needs a gradient.
    """
    rest = acts, tuple(levels), dtype, tuple(needs)
    return list(as_one_plan(_blocks_bwd)(dy, x, *map(tuple, (tensors, results, masks, eps)), *rest))


def _blocks_bwd(dy, x, tensors, results, masks, eps, acts, levels, dtype, needs) -> tuple[Tensor, ...]:
    rest, inputs, saved = iter(results), [x], []
    for level in levels:
        kept = [next(rest) for _ in range(_KEPT[level])]
        saved.append(Saved(*kept, *[None] * (len(Saved._fields) - len(kept))))
        inputs.append(next(rest, None))  # the last y is not an input
    first, wanted = _wanted(masks, needs)
    sizes, places = _layout(tensors, masks, needs)
    memory = {kind: torch.empty(size, dtype=kind, device=x.device) for kind, size in sizes.items()}
    out = [BlockWeights._make(own[:-1]) for own in _cut(_parts(memory, tensors, places), masks)]
    arguments = inputs[first:-1], _blocks(tensors, masks, eps, acts, levels)[first:], saved[first:], wanted
    (dx,) = choose.module("triton").blocks_bwd(dy, *map(tuple, arguments), dtype, tuple(out[first:]))
    return *([] if dx is None else [dx]), *memory.values()


def _cut(values: Iterable[Any], masks: Sequence[int]) -> list[list[Any]]:
    """For each block, the values for its weights and its drop scale; None for absent ones."""
    rest = iter(values)
    return [[next(rest) if mask >> i & 1 else None for i in range(_WEIGHTS + 1)] for mask in masks]


def _blocks(
    tensors: Sequence[Tensor], masks: Sequence[int], eps: Sequence[float], acts: str, levels: Sequence[int]
) -> tuple[BlockCall, ...]:
    options = zip(_cut(tensors, masks), eps, acts.split(","), levels, strict=True)
    return tuple((BlockWeights._make(own[:-1]), own[-1], *rest) for own, *rest in options)


def _wanted(masks: Sequence[int], needs: Sequence[bool]) -> tuple[int, list[tuple[bool, bool]]]:
    """Index of the first block that needs a gradient; ``needs_x`` and ``needs_dwconv`` of that and each later block."""
    first, before, wanted = 0, needs[0], []
    for own in _cut(needs[1:], masks):
        if before or any(own[:-1]):
            wanted.append((before, bool(own[0] or own[1])))
            before = True
        else:
            first += 1
    return first, wanted


def _layout(
    tensors: Sequence[Tensor], masks: Sequence[int], needs: Sequence[bool]
) -> tuple[dict[torch.dtype, int], list[int | None]]:
    """Where the weights' gradients lie: all of one dtype in one tensor, because each result costs compiled code time.

    Returns the number of elements of each dtype, and where the gradient of each of ``tensors`` begins, or None.
    """
    first, wanted = _wanted(masks, needs)
    sizes: dict[torch.dtype, int] = {}
    places: list[int | None] = []
    for number, own in enumerate(_cut(tensors, masks)):
        for i, tensor in enumerate(own):
            if tensor is None:
                continue
            if number < first or i == _WEIGHTS or (i < 2 and not wanted[number - first][1]):
                places.append(None)
                continue
            places.append(sizes.get(tensor.dtype, 0))
            apart = _ALIGNMENT // tensor.dtype.itemsize
            sizes[tensor.dtype] = places[-1] + -(-tensor.numel() // apart) * apart
    return sizes, places


def _parts(
    memory: dict[torch.dtype, Tensor], tensors: Sequence[Tensor], places: Sequence[int | None]
) -> list[Tensor | None]:
    """The gradients, as views of the memory that `_layout` describes."""
    return [
        None if place is None else memory[tensor.dtype][place : place + tensor.numel()].view(tensor.shape)
        for tensor, place in zip(tensors, places, strict=True)
    ]


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
    needs, tensors = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]], saved[: ctx.count]
    found = list(_BACKWARD(dy.contiguous(), x, tensors, saved[ctx.count :], *ctx.options, needs))
    dx = found.pop(0) if needs[0] else None
    sizes, places = _layout(tensors, masks, needs)
    gradients = _parts(dict(zip(sizes, found, strict=True)), tensors, places)
    return dx, gradients, *[None] * len(ctx.options)


def _register(name: str, function: Any, gradients: Any, save: Any = None) -> Any:
    """The operator that a compiler traces, which has a gradient.

    The graph then calls another one, ``<name>_gpu``, without a gradient: with one, each call would enter Python twice.
    """
    whole = f"{name}_gpu"
    _LIBRARY.define(whole + torch.library.infer_schema(function, mutates_args=()))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(whole, function, key)
    torch.library.register_fake(f"convnext_fast::{whole}", function, lib=_LIBRARY)
    in_graph = getattr(torch.ops.convnext_fast, whole)

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        return in_graph(*arguments)

    operator = torch.library.triton_op(f"convnext_fast::{name}", traced, mutates_args=())
    operator.register_autograd(gradients, setup_context=save)
    return operator


_FORWARD = _register("blocks_fwd", _forward, _gradients, _save)
_BACKWARD = _register("blocks_bwd", _backward, autograd.no_second_derivative)
