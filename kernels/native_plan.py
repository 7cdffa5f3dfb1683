"""Replay by one call of C: native_key.c and native_plan.c, compiled as one when the first call is recorded.

Triton compiles it, with the C compiler that it needs for itself, and keeps it in its cache. Where that fails, and for
launches that are not plain kernels on a grid, Python replays the plan, through Triton's own launcher. A kernel's
parameters are read from its PTX: those of its signature, then pointers to scratch buffers, as many as the version of
Triton adds. The first is for kernels that make descriptors (mlp/gemm_tma.py), the others are null.
"""

from __future__ import annotations

import array
import ctypes
import functools
import itertools
import re
import struct
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.build import compile_module_from_src

from .recorded_tensor import Place, RecordedTensor
from .recording import Launch, Part, Plan

_SOURCES = [Path(__file__).with_name(name) for name in ("native_key.c", "native_plan.c")]
_CONSTANT, _PART = -1, 0
"""_CONSTANT replaces the number of a piece of memory. _PART replaces the number of threads, for the plan of a part."""
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
                  _function_of, torch._C._cuda_getCurrentRawStream, allocate)  # fmt: skip


def _function_of(kernel: Any) -> int:
    _ = kernel.run  # loads the kernel
    return kernel.function


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


@functools.cache
def library() -> ModuleType | None:
    """The compiled module; None, after a warning, where there is none."""
    try:
        source = "".join(f'#line 1 "{path.name}"\n{path.read_text()}' for path in _SOURCES)
        module = compile_module_from_src(source, "native_plan")
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        readers = tuple(_address(torch_cpu, f"aoti_torch_get_{name}") for name in _READERS)
        with torch._C.DisableTorchFunction():  # a recording may be the first to ask for this
            one = torch.empty(1)
        module.configure(
            one, torch.nn.Parameter(one), torch.dtype, RecordedTensor, _key_of, readers, Tensor.as_strided,
            float32_precision, torch._C._len_torch_dispatch_stack, knobs.runtime,
        )  # fmt: skip
    except Exception as error:
        _warn(
            f"native_plan.c could not be compiled ({error!r}): install a C compiler (gcc or clang) and Python's "
            "headers (python3-dev)"
        )
        return None
    return module


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"{reason}. Until this is fixed, each call of the kernels takes the host longer.", stacklevel=3)


def of(plan: Plan) -> Any | None:
    """The plan for C, made once; None if C cannot replay it."""
    if plan.native is NotImplemented:
        plan.native = build(plan)
    return plan.native


def _key_of(tensor: RecordedTensor) -> bytes:
    """The part of a call's key that native_key.c makes for a real tensor like this one."""
    if tensor.key is None:
        dim = len(tensor.shape)
        facts = _facts(tensor.dtype, tensor.device) | dim << 8 | tensor.data_ptr() % 16 << 48
        tensor.key = struct.pack(f"{1 + 2 * dim}q", facts, *tensor.shape, *tensor.strides)
    return tensor.key


@functools.cache
def _facts(dtype: torch.dtype, device: torch.device) -> int:
    """The first number of a tensor's key, without the count of dimensions and the alignment."""
    with torch._C.DisableTorchFunction():
        key = library().key((torch.empty((), dtype=dtype, device=device),))
    return int.from_bytes(key[:8], "little") & ~(15 << 48)


def build(plan: Plan) -> Any | None:
    """Make the plan that `of` returns."""
    module = library()
    if module is None:
        return None
    memory = plan.given + len(plan.pieces)
    if memory > module.MOST_BASES:
        _warn(f"a call has {memory} tensors and pieces of memory, C repeats calls with up to {module.MOST_BASES}")
        return None
    driver = cuda()
    launches: list[int] = []
    parameters, owners = bytearray(), []
    for launch in plan.launches:
        if isinstance(launch, Part):
            owner, count = of(launch.plan), len(launch.places)
            if owner is None:
                return None
            launches += id(owner), 0, 0, 0, _PART, 0, count
            parameters += _numbers(itertools.chain.from_iterable(launch.places))
        else:
            owner = launch.kernel
            form = _form(owner)
            values = form and _values(form, launch)
            if values is None:
                return None
            launches += driver.function_of(owner), *launch.grid, form.threads, form.shared, form.count
            parameters += form.pack(*values)
        owners.append(owner)
    return module.Plan(
        driver.launch, driver.current_device, plan.device, plan.given, plan.single, driver.stream_of,
        driver.allocate, tuple(map(tuple, plan.allocations)), _numbers(itertools.chain.from_iterable(plan.pieces)),
        _numbers(launches), bytes(parameters), tuple(plan.results), owners,
    )  # fmt: skip


def _numbers(values: Iterable[int]) -> bytes:
    """As C reads an array of int64_t."""
    return array.array("q", values).tobytes()


class _Form(NamedTuple):
    """How a kernel's parameters are written for C.

    Attributes:
        taken: the numbers of the parameters that the kernel still takes once it is compiled, and which are pointers.
        scratch: how many pointers to scratch buffers follow.
        count: of all parameters, with these pointers.
        pack: writes all of them.
        threads, shared: of a program, the latter in bytes.
    """

    taken: list[tuple[int, bool]]
    scratch: int
    count: int
    pack: Callable[..., bytes]
    threads: int
    shared: int


@functools.cache
def _form(kernel: Any) -> _Form | None:
    """None where C does not support a parameter or an option of the kernel."""
    metadata = kernel.metadata
    more = ("profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "tensordesc_meta")
    if metadata.num_ctas != 1 or any(getattr(metadata, name, None) for name in (*more, "instrumentation_mode")):
        return None
    kinds = {number: kind for number, kind in enumerate(kernel.src.signature.values()) if kind != "constexpr"}
    taken = [(number, kind.startswith("*")) for number, kind in kinds.items()]
    if not all(kind.startswith("*") or kind in FORMATS for kind in kinds.values()):
        return None
    codes = [FORMATS.get(kind, "q") for kind in kinds.values()]
    sizes = list(map(struct.calcsize, codes))
    found = _sizes(kernel.asm["ptx"])
    scratch = len(found) - len(sizes)
    if scratch < 0 or found != sizes + [8] * scratch:
        _warn(f"a kernel of Triton {triton.__version__} takes parameters of {found} bytes, its signature has {sizes}")
        return None
    formats = [f"q{code}{8 - size}x" for code, size in zip(codes, sizes, strict=True)] + ["qq"] * scratch
    warps, _, shared = kernel.packed_metadata[:3]
    return _Form(taken, scratch, len(found), struct.Struct("=" + "".join(formats)).pack, 32 * warps, shared)


def _values(form: _Form, launch: Launch) -> list[Any] | None:
    """What ``form.pack`` takes; None where C does not support a parameter."""
    values: list[Any] = []
    parameters = launch.parameters
    for number, pointer in form.taken:
        value = parameters[number]
        if (type(value) is Place) is not pointer:
            return None
        values += value if pointer else (_CONSTANT, value)
    values += (_CONSTANT, 0) * form.scratch
    if launch.scratch is not None:
        first = 2 * len(form.taken)
        values[first : first + 2] = launch.scratch
    return values


@functools.cache
def _sizes(ptx: str) -> list[int]:
    """The bytes of each parameter of a kernel; 0 for one that is not a number."""
    start = ptx.index(".entry")
    entry = ptx[start : ptx.index(")", start)]
    return [
        0 if "[" in parameter else int(re.search(r"\.[busf](\d+)\b", parameter)[1]) // 8
        for parameter in entry.split(".param")[1:]
    ]
