"""Registration of the fused ops with `torch.library`, as ``convnext_fast::<name>``.

Each operator branches on the device inside its body, so that a compiler traces the path that will run. On a GPU it
sees the kernels. On NVIDIA GPUs, each op is instead one operator, ``<name>_gpu``, whose launches one call of C replays:
launched one by one by compiled code, they took the CPU 1.3 times as long as the unfused model. Several blocks of a
model are one such operator (`block_group_operator`). AOTInductor's programs run without Python, so for them a compiler
sees the kernels on NVIDIA GPUs, too. On a CPU, each op in `result_shapes` is one operator, ``<name>_cpu``: it consists
of loops over rows and samples, kernels and calls of oneDNN, which a compiler cannot improve. A compiler traces or
replaces the other ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..backends import choose
from . import autograd, result_shapes
from .compute import compute
from .signatures import SIGNATURES, Signature, flatten

_LIBRARY = torch.library.Library("convnext_fast", "FRAGMENT")


def _register(signature: Signature) -> Any:
    """The operator of one op."""
    name = signature.name
    shapes = getattr(result_shapes, name, None)
    # A compiled model that runs eagerly, such as under a dispatch mode, must not be compiled piece by piece.
    compute_whole = torch.compiler.disable(compute)
    kind = list if name.endswith("_bwd") else tuple

    def whole(*flat: Any) -> Any:
        arguments = signature.group(flat)
        dtype = arguments[signature.names.index("dtype")]
        results = compute_whole(name, choose.select(flat[0].device, dtype), arguments)
        return results if isinstance(results, Tensor) else kind(_present(flat[0], *results))

    whole.__signature__ = signature.flat  # type: ignore[attr-defined]
    on_cpu = None
    if shapes is not None:
        on_cpu = torch.library.custom_op(f"convnext_fast::{name}_cpu", whole, mutates_args=())
        on_cpu.register_fake(lambda *flat: shapes(*signature.group(flat)))

    on_gpu = _register_whole(f"{name}_gpu", whole)

    def branched(*flat: Any) -> Any:
        x = flat[0]
        if isinstance(x, (FakeTensor, FunctionalTensor)):
            if x.device.type == "cpu":
                if on_cpu is not None and choose.select(x.device, torch.float32) in ("cpu", "aten"):
                    return on_cpu(*flat)
            elif choose.is_whole(x.device):
                return on_gpu(*flat)
        return whole(*flat)

    branched.__signature__ = signature.flat  # type: ignore[attr-defined]
    operator = torch.library.triton_op(f"convnext_fast::{name}", branched, mutates_args=())
    if name in autograd.FORMULAS:
        operator.register_autograd(
            lambda ctx, dy, *_: autograd.gradients(name, ctx, ctx.needs_input_grad, dy, _run),
            setup_context=lambda ctx, inputs, output: autograd.save(name, ctx, signature.group(inputs), output),
        )
    elif name.endswith("_bwd"):
        operator.register_autograd(autograd.no_second_derivative)
    return operator


def _register_whole(name: str, whole: Callable[..., Any]) -> Any:
    """An operator that a compiler does not look into, registered with the dispatcher: see `sequence_operator`."""
    _LIBRARY.define(name + torch.library.infer_schema(whole, mutates_args=()))
    _LIBRARY.impl(name, whole, "CUDA")
    torch.library.register_fake(f"convnext_fast::{name}", whole, lib=_LIBRARY)
    return getattr(torch.ops.convnext_fast, name)


def _run(ctx: Any, name: str, *arguments: Any) -> Any:
    return map(autograd.present, OPERATORS[name](*flatten(arguments)))


def _present(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Operators return only tensors: an absent one is empty and one-dimensional, which no real result is."""
    return tuple(x.new_empty(0) if t is None else t for t in tensors)


OPERATORS = {name: _register(signature) for name, signature in SIGNATURES.items()}
"""By the op's name; each takes flat arguments."""
