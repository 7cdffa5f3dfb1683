"""Compile recorded Triton launches for GPUs that are not present, and report what the compiler made of them.

    with recording() as launches:
        dwconv_fwd(x, weight, bias, torch.bfloat16)      # tensors may be on the meta device; nothing runs
    for item in launches:
        print(compile_launch(item, "sm_90"))

A launch is compiled with the specialisation that it would have on a device: `specialise`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
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
    """What one compiled kernel needs: registers per thread, spills (see compile_launch), shared memory in bytes."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    num_warps: int


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """In this context Triton launches are listed, not run; tensors may be on any device, the meta device included."""
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


@dataclasses.dataclass(frozen=True)
class Specialised:
    """A launch as Triton compiles it for a target: what ``triton.compiler.ASTSource`` takes, and the options."""

    kernel: Any
    target: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for launches that share one compiled kernel."""
        kernel = f"{self.kernel.fn.__module__}.{self.kernel.fn.__qualname__}"
        return repr((kernel, self.target, self.signature, self.constants, self.attributes, self.options))

    @property
    def gpu(self) -> GPUTarget:
        """The target as Triton names it."""
        return GPU_TARGETS[self.target]

    def source(self) -> ASTSource:
        """What ``triton.compile`` takes."""
        made: Any = ASTSource
        if self.kernel.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource as made
        return made(fn=self.kernel, signature=self.signature, constexprs=self.constants, attrs=self.attributes)


def specialise(launch: Launch, target: str) -> Specialised:
    """The specialisation of a recorded launch, by the function with which Triton binds arguments on a device.

    Alignment, integers equal to 1, ``do_not_specialize`` and AMD's pointer ranges are therefore as on a device.
    """
    gpu = make_backend(GPU_TARGETS[target])
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, gpu)
    bound, specialisation, _ = bind(**launch.arguments, **launch.options)
    packed = launch.kernel._pack_args(gpu, dict(launch.options), bound, specialisation, None)
    options, signature, constants, attributes = packed
    return Specialised(launch.kernel, target, signature, constants, attributes, dict(options.__dict__))


def compile_kernel(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel (``.asm``, ``.metadata``) of a recorded launch for one of ``GPU_TARGETS``."""
    specialised = specialise(launch, target)
    return triton.compile(specialised.source(), target=specialised.gpu, options=specialised.options)


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
