"""Registration of the fused ops with `torch.library`: forwards, backwards and the autograd between them.

Each operator branches on the device inside its body, so that a compiler traces the path that will run. `ops` is the
public face.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..backends import choose
from ..backends.cpu import ops as cpu
from . import batched, call, flops, result_shapes
from .views import unlinked

Gradients = tuple[Tensor | None, ...]


def _path(x: Tensor, dtype: torch.dtype) -> ModuleType:
    """The module that implements the ops for x."""
    if choose.select(x.device, dtype) == "triton":
        from ..backends import gpu

        return gpu
    return cpu


class Operator:
    """``convnext_fast::<name of function>``, run with autocast off: the ops cast by themselves.

    A compiler sees the kernels that a GPU runs. What a CPU runs (those that `fake` knows) it calls as one operator,
    ``<name>_cpu``: loops over rows and samples, and calls of oneDNN that it cannot better.

    PyTorch's dispatcher costs an operator about 0.1 ms a call, more than most kernels take. So where nothing looks on
    (`backend.is_plain`) a call runs the function itself, and autograd the same backward by a plain
    `torch.autograd.Function`. Absent results are None there; operators return tensors only, see `_present`.
    """

    def __init__(self, function: Callable):
        name = function.__name__
        shapes = getattr(result_shapes, name, None)
        self.function = function
        self.differentiable: type[torch.autograd.Function] | None = None

        # Where a compiled model runs eagerly, under a mode that dispatches, say, it is not to be compiled by pieces.
        unseen = torch.compiler.disable(function)

        @functools.wraps(function)
        def whole(x: Tensor, *args: object) -> object:
            with torch.autocast(x.device.type, enabled=False):
                results = unseen(x, *args)
            return results if isinstance(results, Tensor) else type(results)(_present(x, *results))

        if shapes is not None:
            on_cpu = torch.library.custom_op(f"convnext_fast::{name}_cpu", whole, mutates_args=())
            on_cpu.register_fake(shapes)

        @functools.wraps(function)
        def branched(x: Tensor, *args: object) -> object:
            traced = shapes is not None and isinstance(x, (FakeTensor, FunctionalTensor))
            if traced and x.device.type == "cpu" and choose.select(x.device, torch.float32) == "aten":
                return on_cpu(x, *args)
            return whole(x, *args)

        self.registered = torch.library.triton_op(f"convnext_fast::{name}", branched, mutates_args=())
        if name.endswith("_bwd"):
            self.registered.register_autograd(_no_second_derivative)

    def register_autograd(self, backward: Callable[..., Gradients], setup_context: Callable[..., None]) -> None:
        """As `torch.library.CustomOpDef.register_autograd`."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        run = self._run

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            output = unlinked(output) if isinstance(output, Tensor) else (unlinked(output[0]), *output[1:])
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        # By a call, for nodes of autograd's graph are called after the class.
        self.differentiable = type(torch.autograd.Function)(self.function.__name__, (torch.autograd.Function,), methods)

    def __call__(self, x: Tensor, *args: Any) -> Any:
        """The results, for arguments like those of the function."""
        if call.is_plain(x, *args):
            if not torch.is_grad_enabled():
                return self._run(x, *args)
            if self.differentiable is not None:
                return self.differentiable.apply(x, *args)
        elif not torch.compiler.is_compiling():
            flops.tell_counters()
        return self.registered(x, *(list(_present(x, *a)) if isinstance(a, list) else a for a in args))

    def _run(self, x: Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return self.function(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return self.function(x, *args)


def _no_second_derivative(ctx: Any, *_: object) -> Gradients:
    raise NotImplementedError(
        "the fused ops have no second derivatives: take the plain reference with fused=False, or torch.func, which does"
    )


def _present(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Operators return tensors only: an absent one is empty and one-dimensional, as no present one is."""
    return tuple(x.new_empty(0) if t is None else t for t in tensors)


def _absent(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The inverse of `_present`, of which None is none the worse."""
    return tuple(None if t is None or (t.dim() == 1 and t.shape[0] == 0) else t for t in tensors)


def _as_inputs(grads: Gradients, *inputs: Tensor | None) -> Gradients:
    """Each gradient in its input's dtype and shape."""
    return tuple(_as_input(g, i) for g, i in zip(grads, inputs, strict=True))


def _as_input(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    if grad is None or like is None or (grad.dtype == like.dtype and grad.shape == like.shape):
        return grad if like is not None else None
    return grad.to(like.dtype).reshape(like.shape)


def _save_for_itself(ctx: Any, *extra: Tensor | None) -> None:
    """Outputs that only the backward reads have no gradient, and that of the result may be None, which means zero."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(tensor for tensor in extra if tensor is not None))


@Operator
def block_fwd(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
    recompute: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, then what ``recompute`` saves: activations before the MLP, their LayerNorm statistics, hidden ones."""
    parameters = (dwconv_weight, dwconv_bias, ln_weight, ln_bias, w1, b1, w2, b2, gamma)
    return _path(x, dtype).block_fwd(x, *parameters, drop_scale, eps, act, recompute, dtype)


@Operator
def block_bwd(
    dy: Tensor,
    x: Tensor,
    saved: list[Tensor],
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
    dtype: torch.dtype,
    needs_x: bool,
    needs_dwconv: bool,
) -> list[Tensor]:
    """Gradients of x and of the nine parameters."""
    parameters = (dwconv_weight, dwconv_bias, ln_weight, ln_bias, w1, b1, w2, b2, gamma)
    grads = _path(x, dtype).block_bwd(
        dy, x, *_absent(*saved), *parameters, drop_scale, eps, act, dtype, needs_x, needs_dwconv
    )
    return list(_as_inputs(grads, x, *parameters))


def _block_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.act, _, ctx.dtype = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    _save_for_itself(ctx, *output[1:])


def _block_autograd(ctx: Any, dy: Tensor | None, *_: object) -> Gradients:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    if batched.is_batched(dy):
        return (*batched.block_bwd(ctx, dy), None, None, None, None)
    x, *tensors = ctx.saved_tensors
    parameters_and_scale, saved = tensors[:10], tensors[10:]
    needs_x, needs_dwconv = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    grads = block_bwd(
        dy.contiguous(), x, saved, *parameters_and_scale, ctx.eps, ctx.act, ctx.dtype, needs_x, needs_dwconv
    )
    return (*_absent(*grads), None, None, None, None, None)


block_fwd.register_autograd(_block_autograd, setup_context=_block_setup)


@Operator
def frozen_block_fwd(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
    act: str,
    dtype: torch.dtype,
) -> Tensor:
    """The block on folded weights. Has no gradient."""
    return _path(x, dtype).frozen_block_fwd(x, dwconv_weight, dwconv_bias, w1, b1, w2, b2, eps, act, dtype)


@Operator
def dwconv_layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, then what is saved: the convolution's output and its LayerNorm statistics."""
    return _path(x, dtype).dwconv_layernorm_fwd(x, weight, bias, ln_weight, ln_bias, eps, dtype)


@Operator
def dwconv_layernorm_bwd(
    dn: Tensor,
    x: Tensor,
    u: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of x and of the four parameters."""
    parameters = (weight, bias, ln_weight, ln_bias)
    grads = _path(x, dtype).dwconv_layernorm_bwd(dn, x, u, statistics, *parameters, eps, dtype)
    return list(_as_inputs(grads, x, *parameters))


def _dwconv_layernorm_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, *parameters, ctx.eps, ctx.dtype = inputs
    ctx.save_for_backward(x, *output[1:], *parameters)
    _save_for_itself(ctx, *output[1:])


def _dwconv_layernorm_autograd(ctx: Any, dn: Tensor | None, *_: object) -> Gradients:
    if dn is None:
        return (None,) * len(ctx.needs_input_grad)
    if batched.is_batched(dn):
        return (*batched.dwconv_layernorm_bwd(ctx, dn), None, None)
    grads = dwconv_layernorm_bwd(dn.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.dtype)
    return (*_absent(*grads), None, None)


dwconv_layernorm_fwd.register_autograd(_dwconv_layernorm_autograd, setup_context=_dwconv_layernorm_setup)


@Operator
def pointwise_mlp_fwd(
    x: Tensor,
    residual: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    act: str,
    recompute: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y, then the hidden activations that level 0 of ``recompute`` saves."""
    return _path(x, dtype).pointwise_mlp_fwd(x, residual, w1, b1, w2, b2, gamma, drop_scale, act, recompute, dtype)


@Operator
def pointwise_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    act: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of x and of the five parameters; the residual's is dy."""
    parameters = (w1, b1, w2, b2, gamma)
    grads = _path(x, dtype).pointwise_mlp_bwd(dy, x, *_absent(a), *parameters, drop_scale, act, dtype)
    return list(_as_inputs(grads, x, *parameters))


def _pointwise_mlp_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, residual, *parameters_and_scale, ctx.act, _, ctx.dtype = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, output[1], *parameters_and_scale)
    _save_for_itself(ctx, output[1])


def _pointwise_mlp_autograd(ctx: Any, dy: Tensor | None, *_: object) -> Gradients:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    if batched.is_batched(dy):
        return (*batched.pointwise_mlp_bwd(ctx, dy), None, None, None)
    grads = _absent(*pointwise_mlp_bwd(dy.contiguous(), *ctx.saved_tensors, ctx.act, ctx.dtype))
    return (grads[0], dy if ctx.has_residual else None, *grads[1:], None, None, None, None)


pointwise_mlp_fwd.register_autograd(_pointwise_mlp_autograd, setup_context=_pointwise_mlp_setup)


@Operator
def patchify_stem_fwd(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm of the patch convolution. Kernels only."""
    return _path(image, dtype).patchify_stem_fwd(image, weight, bias, ln_weight, ln_bias, eps, dtype)


@Operator
def patchify_stem_bwd(
    dy: Tensor,
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    needs_image: bool,
) -> list[Tensor]:
    """Gradients of the image and of the four parameters."""
    parameters = (weight, bias, ln_weight, ln_bias)
    grads = _path(image, dtype).patchify_stem_bwd(dy, image, *parameters, eps, needs_image)
    return list(_as_inputs(grads, image, *parameters))


def _patchify_stem_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _patchify_stem_autograd(ctx: Any, dy: Tensor) -> Gradients:
    if batched.is_batched(dy):
        return (*batched.patchify_stem_bwd(ctx, dy), None, None)
    grads = patchify_stem_bwd(dy.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.dtype, ctx.needs_input_grad[0])
    return (*_absent(*grads), None, None)


patchify_stem_fwd.register_autograd(_patchify_stem_autograd, setup_context=_patchify_stem_setup)


@Operator
def downsample_fwd(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Patch convolution of LayerNorm(x). Kernels only."""
    return _path(x, dtype).downsample_fwd(x, ln_weight, ln_bias, weight, bias, eps, dtype)


@Operator
def frozen_downsample_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Patch convolution of LayerNorm(x) by folded weights. Kernels only. Has no gradient."""
    return _path(x, dtype).frozen_downsample_fwd(x, weight, bias, eps, dtype)


@Operator
def downsample_bwd(
    dy: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of x and of the four parameters."""
    parameters = (ln_weight, ln_bias, weight, bias)
    grads = _path(x, dtype).downsample_bwd(dy, x, *parameters, eps, dtype)
    return list(_as_inputs(grads, x, *parameters))


def _downsample_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _downsample_autograd(ctx: Any, dy: Tensor) -> Gradients:
    if batched.is_batched(dy):
        return (*batched.downsample_bwd(ctx, dy), None, None)
    return (*_absent(*downsample_bwd(dy.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.dtype)), None, None)


downsample_fwd.register_autograd(_downsample_autograd, setup_context=_downsample_setup)
