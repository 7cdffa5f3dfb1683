"""How a call of a fused op runs: for its value alone, under autograd, or as a registered operator.

PyTorch's dispatcher takes about 0.1 ms for a call of an operator, more than most kernels, and registering operators
imports PyTorch's compiler, which takes a second. So a call on plain tensors that no compiler, mode or tracer observes
runs the backend's function itself, under autograd as a plain `torch.autograd.Function`. Every other call runs the
operator ``convnext_fast::<name>``. `backends.choose` decides where a call runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as _modes

from ..backends import choose
from ..backends.interface import Gradients
from . import autograd, flops
from .compute import compute
from .signatures import SIGNATURES, flatten
from .views import unlinked

_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_TRANSPARENT = ("downsample_fwd", "downsample_bwd")
"""Ops that are ATen calls on a CPU, which modes and tensor subclasses may observe."""
_PLAIN = _TENSORS | {type(None), torch.dtype, bool, int, float, str}


def run(name: str, backend: choose.Name, *arguments: Any) -> Any:
    """Run the op ``name`` on ``backend`` (see `interface.Backend`). A forward returns only its first result, a backward
    all gradients; absent ones are None or empty.

    Autograd records the forward of an op on plain weights. An op on frozen weights has no gradient and must not be
    called if one is needed. The first argument is a tensor.
    """
    flat = flatten(arguments)
    if not is_plain(*flat) and not (name in _TRANSPARENT and backend != "triton"):
        operator = _operator(name)
        if not torch.compiler.is_compiling():
            flops.register_formulas()
        return _of_operator(name, operator(*flat))
    if any(t.is_neg() for t in flat if t.__class__ in _TENSORS):  # backends ignore the negative bit
        flat = [t.resolve_neg() if isinstance(t, Tensor) else t for t in flat]
        arguments = SIGNATURES[name].group(flat)
    if name in _APPLY or not torch.is_grad_enabled() or name.startswith("frozen"):
        return run_plain(name, backend, *arguments)
    return _of_operator(name, _operator(name)(*flat))  # a backward that autograd records


def run_plain(name: str, backend: choose.Name, *arguments: Any) -> Any:
    """As `run`, for arguments that are known to be plain (see `is_plain`), no tensor among them a negative view."""
    apply = _APPLY.get(name) if torch.is_grad_enabled() else None
    if apply is not None:
        return apply(backend, arguments, *flatten(arguments))
    return _returned(name, compute(name, backend, arguments))


def _returned(name: str, results: Any) -> Any:
    return results if isinstance(results, Tensor) or name.endswith("_bwd") else results[0]


def _of_operator(name: str, results: Any) -> Any:
    return list(map(autograd.present, results)) if name.endswith("_bwd") else _returned(name, results)


def _operator(name: str) -> Any:
    from .operators import OPERATORS  # imported late: it imports PyTorch's compiler

    return OPERATORS[name]


def _apply(name: str) -> Callable[..., Tensor]:
    """The op under autograd: ``apply(backend, arguments, *the same flat)``: autograd sees no tensors in groups."""

    def forward(ctx: Any, backend: choose.Name, arguments: tuple[Any, ...], *flat: Any) -> Any:
        results = compute(name, backend, arguments)
        y, *kept = (results,) if isinstance(results, Tensor) else results
        autograd.FORMULAS[name].save(ctx, arguments, kept)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        return unlinked(y)

    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        return None, None, *autograd.gradients(name, ctx, ctx.needs_input_grad[2:], dy, _run_backward)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    # The class gets the op's name, because nodes of autograd's graph are named after it.
    function = type(torch.autograd.Function)(name, (torch.autograd.Function,), methods)
    # Skips what `Function.apply` does for the transforms of `torch.func`: these run the reference.
    return super(torch.autograd.Function, function).apply


def _run_backward(ctx: Any, name: str, dy: Tensor, *arguments: Any) -> Any:
    # The saved tensors are those that the forward ran on.
    plain = is_plain(dy) and not dy.is_neg() and not torch.is_grad_enabled()
    return (run_plain if plain else run)(name, ctx.backend, dy, *arguments)


_APPLY = {name: _apply(name) for name in autograd.FORMULAS}


def sees_layers(x: Any) -> bool:
    """Whether a call on x (N, C, H, W) is observed by something that should see calls of layers, not a fused op.

    That is tracing by `torch.fx` or `torch.jit.trace`, export to ONNX, `torch.export` except on a GPU, or a mode that
    counts the FLOPs of a model that is not compiled.
    """
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        exports = choose.is_exporting() and x.device.type not in choose.KERNEL_DEVICES
        return exports or torch.onnx.is_in_onnx_export()
    # A compiled model keeps its fused ops under a mode: PyTorch does not compile there, nor later what ran there.
    if not torch._C._len_torch_dispatch_stack() or get_eval_frame_callback() is not None:
        return False
    modes = (type(mode).__name__ for mode in _modes())
    return any("Flop" in name or name == "ProxyTorchDispatchMode" for name in modes)


def is_plain(*arguments: object) -> bool:
    """Whether no compiler, dispatch mode or tensor subclass observes a call on these arguments."""
    return (
        not torch.compiler.is_compiling()
        and _PLAIN.issuperset(map(type, arguments))
        and not torch._C._len_torch_dispatch_stack()
    )


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for x; it leaves float64 alone, and the meta device has none."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on for x, otherwise x's own."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def wants_values(x: Tensor) -> bool:
    """Whether a call on x only needs its value."""
    return not torch.is_grad_enabled() and is_unobserved(x)


def is_unobserved(x: Tensor) -> bool:
    """Whether nothing but autograd observes a call on x or changes its dtype."""
    return type(x) is Tensor and not autocasts(x) and not torch.jit.is_tracing() and is_plain(x)


def compiles_for_values(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a compiler traces a call on x, in x's dtype, that needs no gradient."""
    return torch.compiler.is_compiling() and not autocasts(x) and not wants_gradient(x, *weights)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
