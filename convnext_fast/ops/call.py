"""How a call of a fused op runs: for its value alone, under autograd, or as a registered operator.

PyTorch's dispatcher costs an operator about 0.1 ms a call, more than most kernels take, and registering operators
imports its compiler, which takes a second. So a call on plain tensors that no compiler, mode or tracer observes runs
the backend's function itself, under autograd as a plain `torch.autograd.Function`. Every other call runs the operator
``convnext_fast::<name>``. `backends.choose` decides where a call runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..backends.interface import Gradients
from . import autograd, flops
from .compute import compute
from .signatures import SIGNATURES, flatten
from .views import unlinked

_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_TRANSPARENT = ("downsample_fwd", "downsample_bwd")
"""Ops that are ATen calls on a CPU, which modes and other kinds of tensors may observe."""
_PLAIN = _TENSORS | {type(None), torch.dtype, bool, int, float, str}


def run(name: str, backend: choose.Name, *arguments: Any) -> Any:
    """The results of the op ``name`` on ``backend``, as `interface.Backend` says; absent ones are None or empty.

    Autograd records the forward of an op on plain weights; one on frozen weights has no gradient and must not be
    called if one is needed. The first argument is a tensor.
    """
    flat = flatten(arguments)
    if not is_plain(*flat) and not (name in _TRANSPARENT and backend != "triton"):
        operator = _operator(name)
        if not torch.compiler.is_compiling():
            flops.register_formulas()
        return operator(*flat)
    if any(t.is_neg() for t in flat if t.__class__ in _TENSORS):  # a backend reads memory as it is
        flat = [t.resolve_neg() if isinstance(t, Tensor) else t for t in flat]
        arguments = SIGNATURES[name].group(flat)
    if not torch.is_grad_enabled() or name.startswith("frozen"):
        return compute(name, backend, arguments)
    function = _FUNCTIONS.get(name)
    return _operator(name)(*flat) if function is None else function.apply(backend, *flat)


def _operator(name: str) -> Any:
    from .operators import OPERATORS  # when it is needed: it imports PyTorch's compiler

    return OPERATORS[name]


def _function(name: str) -> type[torch.autograd.Function]:
    """The op under autograd: ``apply(backend, *flat arguments)``."""

    def forward(ctx: Any, backend: choose.Name, *flat: Any) -> Any:
        arguments = SIGNATURES[name].group(flat)
        output = compute(name, backend, arguments)
        output = unlinked(output) if isinstance(output, Tensor) else (unlinked(output[0]), *output[1:])
        autograd.save(name, ctx, arguments, output)
        ctx.run = functools.partial(_run_backward, backend)
        return output

    def backward(ctx: Any, dy: Tensor | None, *_: object) -> Gradients:
        return None, *autograd.gradients(name, ctx, ctx.needs_input_grad[1:], dy, ctx.run)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    # By a call, for nodes of autograd's graph are called after the class.
    return type(torch.autograd.Function)(name, (torch.autograd.Function,), methods)


def _run_backward(backend: choose.Name, name: str, *arguments: Any) -> Any:
    return run(name, backend, *arguments)


_FUNCTIONS = {name: _function(name) for name in autograd.FORMULAS}


def is_plain(*arguments: object) -> bool:
    """Whether no compiler, dispatch mode or kind of tensor observes a call on these arguments."""
    return (
        not torch.compiler.is_compiling()
        and _PLAIN.issuperset(map(type, arguments))
        and not torch._C._len_torch_dispatch_stack()
    )


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for x; it leaves float64 alone, and the meta device has none."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64


def wants_values(x: Tensor) -> bool:
    """Whether a call on x only needs its value."""
    return not torch.is_grad_enabled() and is_unseen(x)


def is_unseen(x: Tensor) -> bool:
    """Whether nothing but autograd observes a call on x or changes its dtype."""
    return type(x) is Tensor and not autocasts(x) and not torch.jit.is_tracing() and is_plain(x)


def compiles_for_values(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a compiler traces a call on x, in x's dtype, that needs no gradient."""
    return torch.compiler.is_compiling() and not autocasts(x) and not wants_gradient(x, *weights)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
