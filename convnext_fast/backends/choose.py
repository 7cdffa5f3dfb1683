"""Which path a call takes: the Triton kernels, the ATen form of the same ops, or the plain reference."""

from __future__ import annotations

import functools
import os
from typing import Literal

import torch

Backend = Literal["triton", "aten", "reference"]
REQUESTS = ("auto", "triton", "aten", "reference")
KERNEL_DEVICES = ("cuda", "xpu")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _read_environment() -> str:
    request = os.environ.get("CONVNEXT_FAST_BACKEND", "auto").strip().lower() or "auto"
    if request not in REQUESTS:
        raise ValueError(f"CONVNEXT_FAST_BACKEND is {request!r}: expected one of {', '.join(REQUESTS)}")
    return request


REQUEST = _read_environment()
"""What ``CONVNEXT_FAST_BACKEND`` asked for when the package was imported; one value for the whole process."""


def select(device: torch.device, dtype: torch.dtype) -> Backend:
    """The path that the fused ops take for activations on ``device`` computed in ``dtype``.

    ``auto`` takes the Triton kernels on CUDA, ROCm and XPU devices, the ATen form on every other, and the reference
    for what the kernels cannot do on a GPU: float64, and NVIDIA's GPUs before compute capability 8.0. Under
    ``TRITON_INTERPRET=1`` a CPU takes the kernels too. Export to ONNX, `torch.jit.trace` and, on a CPU, `torch.export`
    take the reference, so that a file needs no operator of ours, and so do forward-mode derivatives and the transforms
    of `torch.func` (grad, jvp, vmap, …), which see into it, and the meta device.

    Raises:
        ValueError: ``CONVNEXT_FAST_BACKEND=triton`` was asked for and the kernels cannot run this dtype.
    """
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch._C._are_functorch_transforms_active():
        return "reference"
    if torch.autograd.forward_ad._current_level >= 0:
        return "reference"
    if REQUEST == "triton":
        if dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"the Triton kernels compute in float32, float16 and bfloat16, not {dtype}: "
                "unset CONVNEXT_FAST_BACKEND or set it to 'reference'"
            )
        return "triton"
    if REQUEST != "auto":
        return REQUEST  # type: ignore[return-value]
    kind = device.type
    if kind in KERNEL_DEVICES:
        served = dtype in KERNEL_DTYPES and (torch.compiler.is_compiling() or not _is_old(device))
        return "triton" if served else "reference"
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and dtype in KERNEL_DTYPES:
        return "triton"
    return "reference" if torch.compiler.is_exporting() or kind == "meta" else "aten"


@functools.cache
def _is_old(device: torch.device) -> bool:
    """Whether ``device`` lacks what the kernels need: a GPU of NVIDIA's before compute capability 8.0."""
    cuda = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return cuda and torch.cuda.get_device_capability(device)[0] < 8
