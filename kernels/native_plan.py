"""Recorded calls repeated by one call of C: native_plan.c, compiled when the first call is recorded.

Triton compiles it, with the C compiler that it needs for itself, and keeps it in its cache. Where that fails, and for
launches that are not plain kernels on a grid, Python repeats the plan, through Triton's own launcher. A kernel's
parameters are read from its PTX: those of its signature, then pointers to scratch buffers, as many as the version of
Triton adds. The first is for kernels that make descriptors (mlp/gemm_tma.py), the others are null.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.build import compile_module_from_src

from .recording import Launch, Place, Plan

_SOURCE = Path(__file__).with_suffix(".c")
_CONSTANT = -1
_READERS = ("dim", "sizes", "strides", "dtype", "device_type", "device_index", "data_ptr")
FORMATS = {
    **{f"{sign}{bits}": code for bits, codes in ((8, "bB"), (16, "hH"), (32, "iI"), (64, "qQ"))
       for sign, code in zip("iu", codes, strict=True)},
    "i1": "b", "u1": "B", "fp32": "f", "fp64": "d",
}  # fmt: skip
"""How `struct` writes a parameter of each of Triton's types."""

if hasattr(torch._C, "_get_fp32_precision_getter"):  # since PyTorch 2.9
    float32_precision = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")
else:
    float32_precision = torch._C._get_cublas_allow_tf32
"""The state of PyTorch's switch for TF32."""


class Driver(NamedTuple):
    """How a device is asked for memory and launches; ``launch`` and ``current_device`` are addresses of C functions."""

    launch: int
    current_device: int
    function_of: Callable[[Any], int]
    stream_of: Callable[[int], int]
    allocate: Callable[[tuple, tuple, torch.dtype], Tensor]


@functools.cache
def cuda() -> Driver:
    """CUDA's driver, and PyTorch's allocator and streams."""
    library = ctypes.CDLL("libcuda.so.1")
    allocate = torch._C._dynamo.guards._empty_strided_cuda
    return Driver(_address(library, "cuLaunchKernel"), _address(library, "cuCtxGetDevice"),
                  operator.attrgetter("function"), torch._C._cuda_getCurrentRawStream, allocate)  # fmt: skip


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


@functools.cache
def library() -> ModuleType | None:
    """The compiled module; None, after a warning, where there is none."""
    try:
        module = compile_module_from_src(_SOURCE.read_text(), "native_plan")
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        readers = tuple(_address(torch_cpu, f"aoti_torch_get_{name}") for name in _READERS)
        module.configure(
            torch.empty(1), torch.nn.Parameter(torch.empty(1)), torch.dtype, readers, Tensor.as_strided,
            float32_precision, torch._C._len_torch_dispatch_stack, knobs.runtime,
        )  # fmt: skip
    except Exception as error:
        _warn(
            f"{_SOURCE.name} could not be compiled ({error!r}): install a C compiler (gcc or clang) and Python's "
            "headers (python3-dev)"
        )
        return None
    return module


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"{reason}. Until then each call of the kernels takes the host longer.", stacklevel=3)


def build(plan: Plan, device: int) -> Any | None:
    """The plan for C, on the device with this number; None where C cannot repeat it."""
    module = library()
    if module is None:
        return None
    if plan.given + len(plan.allocations) > module.MOST_BASES:
        return None
    driver = cuda()
    launches, parameters = bytearray(), bytearray()
    for launch in plan.launches:
        values = _parameters(launch)
        if values is None:
            return None
        warps, _, shared = launch.kernel.packed_metadata[:3]
        handle = driver.function_of(launch.kernel)
        launches += struct.pack("7q", handle, *launch.grid, 32 * warps, shared, len(values))
        parameters += b"".join(values)
    return module.Plan(
        driver.launch, driver.current_device, device, plan.given, plan.single, driver.stream_of,
        driver.allocate, tuple(map(tuple, plan.allocations)), bytes(launches), bytes(parameters), tuple(plan.results),
        [launch.kernel for launch in plan.launches],
    )  # fmt: skip


def _parameters(launch: Launch) -> list[bytes] | None:
    """The kernel's parameters for C; None if C does not support one, or an option of the launch."""
    metadata = launch.kernel.metadata
    more = ("profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "tensordesc_meta")
    if metadata.num_ctas != 1 or any(getattr(metadata, name, None) for name in (*more, "instrumentation_mode")):
        return None
    packed, sizes = [], []
    for kind, value in zip(launch.kernel.src.signature.values(), launch.parameters, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(value, Place) and kind.startswith("*"):
            packed.append(struct.pack("qq", *value))
            sizes.append(8)
        elif kind in FORMATS:
            number = struct.pack(FORMATS[kind], value)
            packed.append(struct.pack("q8s", _CONSTANT, number))
            sizes.append(len(number))
        else:
            return None
    taken = _sizes(launch.kernel.asm["ptx"])
    scratch = len(taken) - len(sizes)
    if scratch < 0 or taken != sizes + [8] * scratch:
        _warn(f"a kernel of Triton {triton.__version__} takes parameters of {taken} bytes and is given {sizes}")
        return None
    pointers = [struct.pack("qq", _CONSTANT, 0)] * scratch
    if launch.scratch is not None:
        pointers[0] = struct.pack("qq", *launch.scratch)
    return packed + pointers


@functools.cache
def _sizes(ptx: str) -> list[int]:
    """The bytes of each parameter of a kernel; 0 for one that is not a number."""
    start = ptx.index(".entry")
    entry = ptx[start : ptx.index(")", start)]
    return [
        0 if "[" in parameter else int(re.search(r"\.[busf](\d+)\b", parameter)[1]) // 8
        for parameter in entry.split(".param")[1:]
    ]
