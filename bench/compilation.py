"""Compile recorded Triton launches for targets that are not there, and report what the compiler made of them.

    with recording() as launches:
        dwconv_fwd(x, weight, bias, torch.bfloat16)      # tensors may be on the meta device; nothing runs
    for item in launches:
        print(compile_launch(item, "sm_90"))

A launch is compiled with the specialisation that it would have on a device: pointers and integers divisible by 16 say
so, integers equal to 1 and Nones are constants.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its grid, its bound arguments by name, and the compiler's options."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return self.kernel.fn.__name__


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, spills (see compile_launch), shared memory in bytes."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    num_warps: int


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, Triton launches are listed instead of run, on tensors of any device, the meta device included."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        bound = dict(zip(names, args, strict=False))
        bound |= {name: value for name, value in kwargs.items() if name in names}
        for parameter in kernel.params:
            if parameter.name not in bound and parameter.has_default:
                bound[parameter.name] = parameter.default
        options = {name: value for name, value in kwargs.items() if name not in names}
        launches.append(Launch(kernel, tuple(grid), bound, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def _integer_type(value: int) -> str:
    if -(2**31) <= value < 2**31:
        return "i32"
    return "i64" if value < 2**63 else "u64"


def specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(signature, constants, attributes) of a launch, in the form that ``triton.compiler.ASTSource`` takes."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            aligned = value.is_meta or value.data_ptr() % 16 == 0
        elif isinstance(value, bool):
            signature[parameter.name] = "u1"
        elif isinstance(value, int):
            signature[parameter.name] = _integer_type(value)
            aligned = value % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            raise TypeError(f"{launch.name}: cannot compile for argument {parameter.name} of {type(value).__name__}")
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_kernel(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel (``.asm``, ``.metadata``) of a recorded launch for one of ``GPU_TARGETS``."""
    signature, constants, attributes = specialise(launch)
    source: Any = ASTSource
    if launch.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    made = source(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(made, target=GPU_TARGETS[target], options=launch.options)


def disassemble(compiled: Any) -> str:
    """Machine code of a kernel compiled for NVIDIA or AMD, as text."""
    if "amdgcn" in compiled.asm:
        return compiled.asm["amdgcn"]
    return _cuobjdump(compiled.asm["cubin"], "-sass")


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile a recorded launch for ``target`` and count registers, spills and shared memory.

    On NVIDIA spills are loads and stores of local memory in the machine code; on AMD they are vector registers that
    went to memory (scalar registers spill to lanes of vector registers, which costs no memory access).
    """
    compiled = compile_kernel(launch, target)
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = {key: int(value) for key, value in re.findall(r"\.(vgpr(?:_spill)?_count):\s+(\d+)", text)}
        registers, spills = found["vgpr_count"], found["vgpr_spill_count"]
    else:
        registers = int(re.search(r"REG:(\d+)", _cuobjdump(compiled.asm["cubin"], "-res-usage")).group(1))
        spills = len(re.findall(r"\b(?:LDL|STL)\b", _cuobjdump(compiled.asm["cubin"], "-sass")))
    metadata = compiled.metadata
    return Resources(launch.name, target, registers, spills, metadata.shared, metadata.num_warps)
