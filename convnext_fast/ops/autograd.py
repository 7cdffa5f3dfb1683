"""What the fused ops save for their backward passes, and the arguments of these passes.

The same formulas serve a plain `torch.autograd.Function` (`call`) and the registered operators (`operators`). Both see
flat arguments (`signatures`); a result that is absent is None in the first, an empty tensor in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.interface import Gradients
from ..kernels.weights import BlockWeights, ConvNorm, MlpWeights, NormConv, Saved
from .signatures import SIGNATURES

Needs = Sequence[bool]
REFERENCE = "plain PyTorch (fused=False of this package's models, unfuse(model) of others)"
"""What computes the derivatives that the fused ops do not have."""


class Formulas(NamedTuple):
    """The functions of one op.

    save: takes the context, the arguments in groups, and the results after the first. backward: takes the context,
    which flat inputs need a gradient, and the gradient of the first result; returns the arguments of the backward op.
    """

    save: Callable[[Any, list[Any], Gradients], None]
    backward: Callable[[Any, Needs, Tensor], tuple[Any, ...]]


def present(tensor: Tensor | None) -> Tensor | None:
    """The tensor; None for an absent one, which an operator returns as an empty one-dimensional one."""
    return None if tensor is None or (tensor.dim() == 1 and tensor.shape[0] == 0) else tensor


def _save_block(ctx: Any, arguments: list[Any], kept: Gradients) -> None:
    x, weights, drop_scale, ctx.eps, ctx.act, _, ctx.dtype = arguments
    ctx.save_for_backward(x, *weights, drop_scale, *kept)


def _block_bwd(ctx: Any, needs: Needs, dy: Tensor) -> tuple[Any, ...]:
    x, *tensors = ctx.saved_tensors
    count = len(BlockWeights._fields)
    weights, drop_scale = BlockWeights(*tensors[:count]), tensors[count]
    saved = Saved(*map(present, tensors[count + 1 :]))
    return dy, x, saved, weights, drop_scale, ctx.eps, ctx.act, ctx.dtype, needs[0], any(needs[1:3])


def _save_dwconv_layernorm(ctx: Any, arguments: list[Any], kept: Gradients) -> None:
    x, weights, ctx.eps, ctx.dtype = arguments
    ctx.save_for_backward(x, *kept, *weights)


def _dwconv_layernorm_bwd(ctx: Any, needs: Needs, dn: Tensor) -> tuple[Any, ...]:
    x, u, statistics, *weights = ctx.saved_tensors
    return dn, x, u, statistics, ConvNorm(*weights), ctx.eps, ctx.dtype


def _save_pointwise_mlp(ctx: Any, arguments: list[Any], kept: Gradients) -> None:
    x, residual, weights, drop_scale, ctx.act, _, ctx.dtype = arguments
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, *kept, *weights, drop_scale)


def _pointwise_mlp_bwd(ctx: Any, needs: Needs, dy: Tensor) -> tuple[Any, ...]:
    x, a, *weights, drop_scale = ctx.saved_tensors
    return dy, x, present(a), MlpWeights(*weights), drop_scale, ctx.act, ctx.dtype


def _save_patches(ctx: Any, arguments: list[Any], kept: Gradients) -> None:
    x, weights, ctx.eps, ctx.dtype, *_ = arguments
    ctx.save_for_backward(x, *weights)


def _patchify_stem_bwd(ctx: Any, needs: Needs, dy: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    return dy, x, ConvNorm(*weights), ctx.eps, ctx.dtype, needs[0]


def _downsample_bwd(ctx: Any, needs: Needs, dy: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    return dy, x, NormConv(*weights), ctx.eps, ctx.dtype, any(needs[:3]), needs[3], needs[4]


FORMULAS = {
    "block_fwd": Formulas(_save_block, _block_bwd),
    "dwconv_layernorm_fwd": Formulas(_save_dwconv_layernorm, _dwconv_layernorm_bwd),
    "pointwise_mlp_fwd": Formulas(_save_pointwise_mlp, _pointwise_mlp_bwd),
    "patchify_stem_fwd": Formulas(_save_patches, _patchify_stem_bwd),
    "downsample_fwd": Formulas(_save_patches, _downsample_bwd),
}
"""By the op's name; ops that are not here have no gradient."""


def save(name: str, ctx: Any, arguments: list[Any], output: Tensor | tuple[Tensor | None, ...]) -> None:
    """Keep on an operator's context what its backward needs; ``arguments`` in groups."""
    kept = () if isinstance(output, Tensor) else output[1:]
    FORMULAS[name].save(ctx, arguments, kept)
    # Only the backward reads the results after the first, and the gradient of the first may be absent.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(tensor for tensor in kept if tensor is not None))


def refuse_batches(dy: Tensor) -> None:
    """Raise NotImplementedError for a dy that stands for a batch of gradients."""
    if torch._C._functorch.is_batchedtensor(dy) or torch._C._functorch.is_legacy_batchedtensor(dy):
        raise NotImplementedError(
            "the fused ops cannot take a batch of output gradients (is_grads_batched, vectorize): "
            f"expected one at a time, or {REFERENCE}"
        )


def no_second_derivative(ctx: Any, *_: object) -> Gradients:
    """The backward of a backward operator: an error."""
    raise NotImplementedError(f"the fused ops have no second derivatives: take {REFERENCE}, or torch.func")


def gradients(
    name: str, ctx: Any, needs: Needs, dy: Tensor | None, run: Callable[..., Sequence[Tensor | None]]
) -> Gradients:
    """The gradient of each flat argument; ``run(ctx, name, *arguments)`` calls the backward op.

    Raises:
        NotImplementedError: dy stands for a batch of gradients.
    """
    if dy is None:
        return SIGNATURES[name].gradients()
    refuse_batches(dy)
    backward, signature = FORMULAS[name].backward, SIGNATURES[name]
    dx, *dweights = run(ctx, signature.backward, *backward(ctx, needs, dy.contiguous()))
    residual = {"residual": dy} if getattr(ctx, "has_residual", False) else {}
    return signature.gradients(x=dx, weights=dweights, **residual)
