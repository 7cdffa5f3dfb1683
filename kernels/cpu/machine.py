"""The processor that kernels are compiled for, and LLVM's compiler for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import llvmlite
from llvmlite import binding, ir


@dataclasses.dataclass(frozen=True)
class Machine:
    """What decides the shape of a kernel. Registers hold rows·vectors sums, ``vectors`` of weights and a scalar."""

    lanes: int  # float32 in a vector
    rows: int  # of a tile of a matrix product; a smaller tile has half as many
    vectors: int  # in a panel of packed weights

    @property
    def panel(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.vectors


AVX512 = Machine(lanes=16, rows=14, vectors=2)
AVX2 = Machine(lanes=8, rows=6, vectors=2)

NEEDED = {AVX2: ("avx2", "fma"), AVX512: ("avx512f", "avx512vl", "fma")}
"""The processor features that each machine needs."""


def host_features() -> dict[str, bool]:
    """What this processor can do, by LLVM's names."""
    return dict(binding.get_host_cpu_features())


def _flags(machine: Machine) -> str:
    features = host_features()
    if machine.lanes < 16:
        features |= {name: False for name in features if name.startswith("avx512")}
    flags = (f"{'+' if has else '-'}{name}" for name, has in sorted(features.items()))
    return ",".join((*flags, "-prefer-256-bit"))


def _target(machine: Machine) -> binding.TargetMachine:
    """LLVM's target machine; an engine takes ownership, so each needs its own."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=_flags(machine), opt=3, jit=True
    )


def identity(machine: Machine) -> str:
    """All that the code of a module depends on besides the module."""
    return f"{binding.get_host_cpu_name()} {_flags(machine)} llvmlite {llvmlite.__version__} {machine}"


def compile_for(machine: Machine, module: ir.Module) -> bytes:
    """The module's code as an object file."""
    target = _target(machine)
    module.triple, module.data_layout = target.triple, str(target.target_data)
    parsed = binding.parse_assembly(str(module))
    # Unrolling and vectorisation are decided in the source.
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = binding.create_pass_builder(target, options)
    passes.getModulePassManager().run(parsed, passes)
    return target.emit_object(parsed)


def load(machine: Machine, code: bytes, symbols: Mapping[str, int]) -> binding.ExecutionEngine:
    """Load code, to run while the returned engine lives. ``symbols``: addresses of functions that it calls."""
    for name, address in symbols.items():
        binding.add_symbol(name, address)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _target(machine))
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine
