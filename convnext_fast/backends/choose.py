"""Chooses the backend of a fused op: Triton kernels, x86 kernels, ATen calls, or the plain reference.

`ops.call` decides how the op is called there.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Literal

import torch

from . import environment
from .cpu import llvm

Name = Literal["triton", "cpu", "aten", "reference"]
KERNEL_DEVICES = ("cuda", "xpu")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _is_transformed() -> bool:
    """Whether a transform of `torch.func` is active."""
    return torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Whether `torch.export` traces the call."""
    return torch.compiler.is_exporting()


def _is_ahead_of_time() -> bool:
    """Whether AOTInductor is compiling. Its programs run without Python."""
    inductor = sys.modules.get("torch._inductor.virtualized")
    return inductor is not None and inductor.V.aot_compilation is True


# A tracer evaluates these at once. Otherwise PyTorch 2.9 puts the first into the graph and assumes the second is true.
for _function in (_is_transformed, is_exporting, _is_ahead_of_time):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_whole(device: torch.device) -> bool:
    """Whether a compiler sees the launches of a fused op on ``device`` as one operator.

    This is so where one call of C makes them, on NVIDIA's GPUs, unless the program will run without Python.
    """
    return device.type == "cuda" and torch.version.hip is None and not _is_ahead_of_time()


def select(device: torch.device, dtype: torch.dtype) -> Name:
    """The backend of the fused ops for activations on ``device`` computed in ``dtype``.

    - "triton": the Triton kernels, on CUDA, ROCm and XPU devices; on a CPU too under ``TRITON_INTERPRET=1``.
    - "cpu": kernels compiled by LLVM, on an x86 CPU in float32 (`cpu.llvm`). Unsupported calls use ATen.
    - "aten": the same ops by calls of ATen and oneDNN, on every other CPU and device. Both are `cpu.ops`.
    - "reference": plain eager PyTorch, for what the kernels do not support on a GPU (float64, and NVIDIA's GPUs before
      compute capability 8.0), for the meta device, and for what must see inside the ops: export to ONNX,
      `torch.jit.trace`, on a CPU `torch.export`, forward-mode derivatives, and the transforms of `torch.func`.

    ``CONVNEXT_FAST_BACKEND`` requests one of "triton", "aten" and "reference". On a CPU, a compiled model gets "aten":
    it calls the ops as operators, which choose again when they run.

    Raises:
        ValueError: ``CONVNEXT_FAST_BACKEND`` has an unknown value, or it is "triton" and the kernels do not support
            this dtype.
    """
    if torch.jit.is_tracing() or _is_transformed():
        return "reference"
    if torch.autograd.forward_ad._current_level >= 0:
        return "reference"
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():  # the other ONNX exporter uses torch.jit.trace
        return "reference"
    if environment.REQUEST == "triton":
        if dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"the Triton kernels compute in float32, float16 and bfloat16, not {dtype}: "
                "unset CONVNEXT_FAST_BACKEND or set it to 'reference'"
            )
        return "triton"
    if environment.REQUEST != "auto":
        environment.check()
        return environment.REQUEST  # type: ignore[return-value]
    kind = device.type
    if kind in KERNEL_DEVICES:
        served = dtype in KERNEL_DTYPES and (torch.compiler.is_compiling() or not _is_old(device))
        return "triton" if served else "reference"
    if kind != "cpu":
        return "reference" if is_exporting() or kind == "meta" else "aten"
    if environment.INTERPRETS and dtype in KERNEL_DTYPES:
        return "triton"
    if torch.compiler.is_compiling():
        return "reference" if is_exporting() else "aten"
    return "cpu" if dtype == torch.float32 and llvm.machine_for() is not None else "aten"


@functools.cache
def module(name: Name) -> ModuleType:
    """The functions of a backend (see `interface.Backend`). "reference" gets those of the CPU."""
    if name == "triton":
        from . import gpu  # imports Triton

        return gpu
    from .cpu import ops

    return ops


@functools.cache
def _is_old(device: torch.device) -> bool:
    """Whether ``device`` is an NVIDIA GPU before compute capability 8.0, which the kernels do not support."""
    cuda = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return cuda and torch.cuda.get_device_capability(device)[0] < 8
