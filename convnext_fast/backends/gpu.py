"""The fused ops by the Triton kernels: what ``fused=True`` runs on a GPU.

For the types of long argument lists see `interface.Backend`. T is the compute dtype, R the dtype of the residual
stream; the kernels sum and keep statistics in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels import patchify
from ..kernels.folding import fold_bwd, fold_fwd
from ..kernels.layernorm import layernorm_bwd, layernorm_fwd
from ..kernels.mlp import mlp_bwd, mlp_fwd
from ..kernels.mlp.grn import Grn
from ..kernels.replaying import composed, description, is_observed, replayed
from ..kernels.weights import BlockWeights, ConvNorm, FrozenBlock, FrozenDownsample, MlpWeights, NormConv, Saved
from .dwconv import dwconv_dgrad, dwconv_fwd, dwconv_wgrad, dwconv_wgrad_partials
from .interface import Gradients, like_inputs

__all__ = ["composed", "description", "is_observed"]  # and the functions of `interface.Backend`
Weights = TypeVar("Weights", bound=tuple)


def _dense(weights: Weights) -> Weights:
    """The weights in contiguous memory, as the kernels read them."""
    return weights._make(None if t is None else t.contiguous() for t in weights)  # type: ignore[attr-defined]


def _like_its_inputs(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Converts gradients to the dtypes of the inputs, outside of the replay, which repeats only launches of kernels."""

    @functools.wraps(backward)
    def call(dy: Tensor, x: Tensor, *arguments: Any) -> Gradients:
        (weights,) = (argument for argument in arguments if isinstance(argument, tuple))
        return like_inputs(backward(dy, x, *arguments), x, weights)

    return call


def _without_norm(weights: MlpWeights) -> BlockWeights:
    """The MLP of a block that has neither convolution nor LayerNorm, contiguous."""
    return BlockWeights(None, None, None, None, *_dense(weights))


def _grn(weights: BlockWeights, samples: int) -> Grn | None:
    """The global response norm of a V2 block."""
    return None if weights.grn_weight is None else Grn(weights.grn_weight, weights.grn_bias, samples)


def _above_zero(eps: float) -> float:
    """``eps``, at least 1e-37: a tile's rows beyond the last pixel are divided by its root."""
    return max(eps, 1e-37)


@replayed
def block_fwd(x, weights, drop_scale, eps, act, recompute, dtype, narrow=None, copies=False) -> Gradients:
    """y, and the fields of `Saved` that ``recompute`` keeps; the statistics are the kernels' partial ones.

    In a group of blocks, ``narrow`` is a copy of x in T if x is wider. If the next block needs such a copy of y
    (``copies``), it comes last.
    """
    rows, weights = (-1, x.shape[3]), _dense(weights)
    u, statistics = dwconv_fwd(x if narrow is None else narrow, weights.dwconv_weight, weights.dwconv_bias, dtype)
    folded = fold_fwd(weights, dtype, layer_scale=False)
    b2, gamma = weights.b2, weights.gamma
    drop_scale = None if drop_scale is None else drop_scale.contiguous()
    rest = (gamma, drop_scale, _above_zero(eps), act, recompute == 0, _grn(weights, x.shape[0]))
    y = x.new_empty(x.shape, dtype=_stream(x.dtype, weights))
    copy = x.new_empty(x.shape, dtype=dtype) if copies else None
    out = (y.view(rows), None if copy is None else copy.view(rows))
    _, a = mlp_fwd(u.view(rows), statistics, x.view(rows), *folded, b2, *rest, out)
    kept = (None,) * 4 if recompute >= 2 else (u, statistics, a, None)
    return (y, *kept, copy) if copies else (y, *kept)


def _stream(dtype: torch.dtype, weights: BlockWeights) -> torch.dtype:
    """R after a block whose x is in ``dtype``."""
    gamma = weights.gamma
    return dtype if gamma is None or gamma.dtype == dtype else torch.promote_types(dtype, gamma.dtype)


@replayed
def block_bwd(
    dy, x, saved, weights, drop_scale, eps, act, dtype, needs_x, needs_dwconv, dx_dtype=None, out=None
) -> Gradients:
    """Gradients of x and of the weights; of x alone if ``out``, a `BlockWeights`, receives those of the weights.

    ``dx_dtype``: the dtype of the original x, in a group that kept a copy in T.
    """
    rows, weights = (-1, x.shape[3]), _dense(weights)
    u, statistics, a, _ = saved
    if u is None:
        u, statistics = dwconv_fwd(x, weights.dwconv_weight, weights.dwconv_bias, dtype)
    folded = fold_fwd(weights, dtype, layer_scale=True)
    drop_scale = None if drop_scale is None else drop_scale.contiguous()
    rest = (drop_scale, _above_zero(eps), act, _grn(weights, x.shape[0]))
    du, sums = mlp_bwd(dy.view(rows), u.view(rows), statistics, a, *folded, *rest)
    du = du.view(x.shape)
    dx = dwconv_dgrad(du, weights.dwconv_weight, dy, dx_dtype or x.dtype) if needs_x else None
    partials = dwconv_wgrad_partials(x, du, weights.dwconv_weight.shape[3]) if needs_dwconv else None
    gradients = fold_bwd(sums, weights, partials, out)
    return (dx, *gradients) if out is None else (dx,)


_WAIT = 16
"""Calls of several blocks before they become one plan, which saves 1/20 of a training step and takes one to record."""

BlockCall = tuple[BlockWeights, Tensor | None, float, str, int]
"""What `block_fwd` takes besides x and the dtype, in order."""


@functools.partial(composed, wait=_WAIT)
def blocks_fwd(x: Tensor, blocks: tuple[BlockCall, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Several consecutive blocks, all launches as one plan.

    Returns what the first block keeps (the four of `Saved`), its y, what the second one keeps, its y, and so on.
    Where R is wider than T, the y between blocks are copies in T. Convolutions read only these, forward and backward,
    which halves the bytes.
    """
    results: list[Tensor | None] = []
    narrow = None
    for last, block in zip((*[False] * (len(blocks) - 1), True), blocks, strict=True):
        copies = not last and _stream(x.dtype, block[0]) != dtype
        x, *kept = block_fwd(x, *block, dtype, *((narrow, copies) if copies or narrow is not None else ()))
        narrow = kept.pop() if copies else None
        results += (*kept, narrow if copies else x)
    return tuple(results)


@functools.partial(composed, wait=_WAIT)
def blocks_bwd(
    dy: Tensor,
    inputs: tuple[Tensor, ...],
    blocks: tuple[BlockCall, ...],
    saved: tuple[Saved, ...],
    needs: tuple[tuple[bool, bool], ...],
    dtype: torch.dtype,
    out: tuple[BlockWeights, ...] | None = None,
) -> Gradients:
    """The gradient of the first of ``inputs``, then those of each block's weights, in the blocks' order.

    inputs, saved: of each block its x, as `blocks_fwd` returns it, and what it kept. needs: ``needs_x`` and
    ``needs_dwconv`` of `block_bwd`. out: memory for the gradients of each block's weights, which are not returned then.
    """
    gradients: list[Tensor | None] = []
    out = out or (None,) * len(blocks)
    for x, block, own, wanted, memory in zip(*map(reversed, (inputs, blocks, saved, needs, out)), strict=True):
        weights, drop_scale, eps, act, _ = block
        dx_dtype = None if x is inputs[0] or x.dtype == dy.dtype else dy.dtype
        dy, *grads = block_bwd(dy, x, own, weights, drop_scale, eps, act, dtype, *wanted, dx_dtype, memory)
        gradients = grads + gradients
    return (dy, *gradients)


@replayed
def frozen_block_fwd(x: Tensor, weights: FrozenBlock, eps: float, act: str, dtype: torch.dtype) -> Tensor:
    """The block on folded weights, w1 and w2 in T."""
    rows = (-1, x.shape[3])
    dwconv_weight, dwconv_bias, w1, b1, w2, b2, grn_weight = _dense(weights)
    u, statistics = dwconv_fwd(x, dwconv_weight, dwconv_bias, dtype)
    grn = None if grn_weight is None else Grn(grn_weight, None, x.shape[0])
    rest = (None, None, _above_zero(eps), act, False, grn)
    y, _ = mlp_fwd(u.view(rows), statistics, x.view(rows), w1, b1, w2, b2, *rest)
    return y.view(x.shape)


@replayed
def dwconv_layernorm_fwd(x: Tensor, weights: ConvNorm, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(u), u and its partial statistics."""
    weight, bias, ln_weight, ln_bias = _dense(weights)
    u, statistics = dwconv_fwd(x, weight, bias, dtype)
    return layernorm_fwd(u, statistics, ln_weight, ln_bias, _above_zero(eps)), u, statistics


@_like_its_inputs
@replayed
def dwconv_layernorm_bwd(dn, x, u, statistics, weights, eps, dtype) -> Gradients:
    """Gradients of x and of the weights."""
    weight, _, ln_weight, _ = _dense(weights)
    du, dg, dbeta = layernorm_bwd(dn, u, statistics, ln_weight, _above_zero(eps))
    dx = dwconv_dgrad(du, weight, None, dtype)
    dweight, dbias = dwconv_wgrad(x, du, weight.shape[3], weight.dtype)
    return dx, dweight, dbias, dg, dbeta


@replayed
def pointwise_mlp_fwd(x, residual, weights, drop_scale, act, recompute, dtype) -> tuple[Tensor, Tensor | None]:
    """y, and the hidden units at level 0 of ``recompute``."""
    rows, block = (-1, x.shape[3]), _without_norm(weights)
    folded = fold_fwd(block, dtype, layer_scale=False)
    residual = None if residual is None else residual.view(rows)
    drop_scale = None if drop_scale is None else drop_scale.contiguous()
    inputs, keeps = x.to(dtype).view(rows), recompute == 0
    y, a = mlp_fwd(inputs, None, residual, *folded, block.b2, block.gamma, drop_scale, 0.0, act, keeps)
    return y.view(x.shape), a


@_like_its_inputs
@replayed
def pointwise_mlp_bwd(dy, x, a, weights, drop_scale, act, dtype) -> Gradients:
    """Gradients of x and of the weights; the residual's is dy."""
    rows, block = (-1, x.shape[3]), _without_norm(weights)
    folded = fold_fwd(block, dtype, layer_scale=True)
    drop_scale = None if drop_scale is None else drop_scale.contiguous()
    dx, sums = mlp_bwd(dy.view(rows), x.to(dtype).view(rows), None, a, *folded, drop_scale, 0.0, act)
    return dx.view(x.shape), *fold_bwd(sums, block).mlp()


@replayed
def patchify_stem_fwd(x: Tensor, weights: ConvNorm, eps: float, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """LayerNorm of the patch convolution of an image."""
    return patchify.stem_fwd(x, *_dense(weights), _above_zero(eps), dtype, out_dtype)


@_like_its_inputs
@replayed
def patchify_stem_bwd(dy, x, weights, eps, dtype, needs_x) -> Gradients:
    """Gradients of the image and of the weights."""
    return patchify.stem_bwd(dy, x, *_dense(weights), _above_zero(eps), dtype, needs_x)


@replayed
def downsample_fwd(x: Tensor, weights: NormConv, eps: float, dtype: torch.dtype) -> Tensor:
    """Patch convolution of LayerNorm(x)."""
    ln_weight, ln_bias, weight, bias = _dense(weights)
    folded = patchify.fold_downsample(weight, bias, ln_weight, ln_bias, dtype)
    return patchify.downsample_fwd(x, *folded, _above_zero(eps), dtype)


@_like_its_inputs
@replayed
def downsample_bwd(dy, x, weights, eps, dtype, needs_norm, needs_weight, needs_bias) -> Gradients:
    """Gradients of x and of the weights. All are computed, because they come from the same launches."""
    ln_weight, ln_bias, weight, bias = _dense(weights)
    parameters = weight, bias, ln_weight, ln_bias
    dx, dweight, dbias, dg, dbeta = patchify.downsample_bwd(dy, x, *parameters, _above_zero(eps), dtype)
    return dx, dg, dbeta, dweight, dbias


@replayed
def frozen_downsample_fwd(x: Tensor, weights: FrozenDownsample, eps: float, dtype: torch.dtype) -> Tensor:
    """Patch convolution of LayerNorm(x) by folded weights, ``weight`` in T."""
    weight, bias = weights.weight.permute(0, 2, 3, 1).contiguous(), weights.bias.contiguous()
    return patchify.downsample_fwd(x, weight, bias, _above_zero(eps), dtype)


AnyWeights = ConvNorm | NormConv | BlockWeights | FrozenDownsample | FrozenBlock


@replayed
def steps(
    x: Tensor, steps: tuple[tuple[AnyWeights, float, str], ...], ends: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The outputs of the steps numbered ``ends``, among several consecutive ones, all launches as one plan.

    x: (N, H, W, C), contiguous, or the image of a stem, which is the first step. steps: for each its weights, eps
    and, of a block, the activation.
    """
    results = []
    for number, (weights, eps, act) in enumerate(steps):
        if isinstance(weights, FrozenBlock):
            x = frozen_block_fwd(x, weights, eps, act, dtype)
        elif isinstance(weights, BlockWeights):
            x = block_fwd(x, weights, None, eps, act, 2, dtype)[0]
        elif isinstance(weights, ConvNorm):
            x = patchify_stem_fwd(x, weights, eps, dtype, dtype)
        else:
            function = downsample_fwd if isinstance(weights, NormConv) else frozen_downsample_fwd
            x = function(x, weights, eps, dtype)
        if number in ends:
            results.append(x)
    return tuple(results)
