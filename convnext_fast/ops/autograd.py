"""What the fused ops save for their backward passes, and the gradients that these return.

The same pair of functions serves a plain `torch.autograd.Function` (`FUNCTIONS`) and the registered operator. Both see
flat arguments (`signatures`); a result that is absent is None in the first, an empty tensor in the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..kernels.weights import BlockWeights, ConvNorm, MlpWeights, NormConv, Saved
from . import call
from .signatures import SIGNATURES
from .views import unlinked

Gradients = tuple[Tensor | None, ...]
Needs = tuple[bool, ...]


class Formulas(NamedTuple):
    """Of one op.

    save: of the context, the arguments in groups and the results besides the first. backward: of the context, which
    flat inputs need a gradient, and the gradient of the first result; returns gradients by the argument's name.
    """

    save: Callable[[Any, list[Any], tuple[Tensor | None, ...]], None]
    backward: Callable[[Any, Needs, Tensor], dict[str, Any]]


def _run(name: str, dy: Tensor, *arguments: Any, dtype: torch.dtype) -> tuple[Tensor | None, Gradients]:
    """The gradients of a backward op: of x, then of the weights."""
    if torch._C._functorch.is_batchedtensor(dy) or torch._C._functorch.is_legacy_batchedtensor(dy):
        raise NotImplementedError(
            "the fused ops cannot take a batch of output gradients (is_grads_batched, vectorize): "
            "expected one at a time, or the plain reference with fused=False"
        )
    dx, *dweights = call.run(name, choose.select(dy.device, dtype), dy.contiguous(), *arguments)
    return _none(dx), tuple(map(_none, dweights))


def _none(tensor: Tensor | None) -> Tensor | None:
    """None for an absent tensor: an operator's is empty and one-dimensional, as no present one is."""
    return None if tensor is None or (tensor.dim() == 1 and tensor.shape[0] == 0) else tensor


def _save_block(ctx: Any, arguments: list[Any], kept: tuple[Tensor | None, ...]) -> None:
    x, weights, drop_scale, ctx.eps, ctx.act, _, ctx.dtype = arguments
    ctx.save_for_backward(x, *weights, drop_scale, *kept)


def _block_bwd(ctx: Any, needs: Needs, dy: Tensor) -> dict[str, Any]:
    x, *tensors = ctx.saved_tensors
    weights, drop_scale, saved = BlockWeights(*tensors[:9]), tensors[9], Saved(*map(_none, tensors[10:]))
    options = ctx.eps, ctx.act, ctx.dtype, needs[0], any(needs[1:3])
    dx, dweights = _run("block_bwd", dy, x, saved, weights, drop_scale, *options, dtype=ctx.dtype)
    return {"x": dx, "weights": dweights}


def _save_dwconv_layernorm(ctx: Any, arguments: list[Any], kept: tuple[Tensor | None, ...]) -> None:
    x, weights, ctx.eps, ctx.dtype = arguments
    ctx.save_for_backward(x, *kept, *weights)


def _dwconv_layernorm_bwd(ctx: Any, needs: Needs, dn: Tensor) -> dict[str, Any]:
    x, u, statistics, *weights = ctx.saved_tensors
    given = x, u, statistics, ConvNorm(*weights), ctx.eps, ctx.dtype
    dx, dweights = _run("dwconv_layernorm_bwd", dn, *given, dtype=ctx.dtype)
    return {"x": dx, "weights": dweights}


def _save_pointwise_mlp(ctx: Any, arguments: list[Any], kept: tuple[Tensor | None, ...]) -> None:
    x, residual, weights, drop_scale, ctx.act, _, ctx.dtype = arguments
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, *kept, *weights, drop_scale)


def _pointwise_mlp_bwd(ctx: Any, needs: Needs, dy: Tensor) -> dict[str, Any]:
    x, a, *weights, drop_scale = ctx.saved_tensors
    given = x, _none(a), MlpWeights(*weights), drop_scale, ctx.act, ctx.dtype
    dx, dweights = _run("pointwise_mlp_bwd", dy, *given, dtype=ctx.dtype)
    return {"x": dx, "residual": dy if ctx.has_residual else None, "weights": dweights}


def _save_patches(ctx: Any, arguments: list[Any], kept: tuple[Tensor | None, ...]) -> None:
    x, weights, ctx.eps, ctx.dtype = arguments
    ctx.save_for_backward(x, *weights)


def _patchify_stem_bwd(ctx: Any, needs: Needs, dy: Tensor) -> dict[str, Any]:
    x, *weights = ctx.saved_tensors
    given = x, ConvNorm(*weights), ctx.eps, ctx.dtype, needs[0]
    dx, dweights = _run("patchify_stem_bwd", dy, *given, dtype=ctx.dtype)
    return {"x": dx, "weights": dweights}


def _downsample_bwd(ctx: Any, needs: Needs, dy: Tensor) -> dict[str, Any]:
    x, *weights = ctx.saved_tensors
    dx, dweights = _run("downsample_bwd", dy, x, NormConv(*weights), ctx.eps, ctx.dtype, dtype=ctx.dtype)
    return {"x": dx, "weights": dweights}


FORMULAS = {
    "block_fwd": Formulas(_save_block, _block_bwd),
    "dwconv_layernorm_fwd": Formulas(_save_dwconv_layernorm, _dwconv_layernorm_bwd),
    "pointwise_mlp_fwd": Formulas(_save_pointwise_mlp, _pointwise_mlp_bwd),
    "patchify_stem_fwd": Formulas(_save_patches, _patchify_stem_bwd),
    "downsample_fwd": Formulas(_save_patches, _downsample_bwd),
}
"""By the op's name; the others have no gradient."""


def save(name: str, ctx: Any, flat: tuple[Any, ...], output: Tensor | tuple[Tensor | None, ...]) -> None:
    """Keep on the context what the backward of the op needs."""
    kept = () if isinstance(output, Tensor) else output[1:]
    FORMULAS[name].save(ctx, SIGNATURES[name].group(flat), kept)
    # The results besides the first are read by the backward alone, and a gradient of the first may be absent.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(tensor for tensor in kept if tensor is not None))


def gradients(name: str, ctx: Any, needs: Needs, dy: Tensor | None) -> Gradients:
    """The gradient of each flat argument."""
    found = {} if dy is None else FORMULAS[name].backward(ctx, needs, dy)
    return SIGNATURES[name].gradients(**found)


def _function(name: str) -> type[torch.autograd.Function]:
    """``apply(backend, *flat arguments)``."""

    def forward(ctx: Any, backend: choose.Name, *flat: Any) -> Any:
        output = call.compute(name, backend, SIGNATURES[name].group(flat))
        output = unlinked(output) if isinstance(output, Tensor) else (unlinked(output[0]), *output[1:])
        save(name, ctx, flat, output)
        return output

    def backward(ctx: Any, dy: Tensor | None, *_: object) -> Gradients:
        return None, *gradients(name, ctx, ctx.needs_input_grad[1:], dy)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    # By a call, for nodes of autograd's graph are called after the class.
    return type(torch.autograd.Function)(name, (torch.autograd.Function,), methods)


FUNCTIONS = {name: _function(name) for name in FORMULAS}
