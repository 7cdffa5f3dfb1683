"""Describe a compiled kernel: registers, spills, shared memory, instructions, and how wide its accesses are.

Results are kept in Triton's own cache, beside the machine code that they describe.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from bench.static_analysis.compilation import _cuobjdump
from bench.static_analysis.recording import Specialised

# A worker of a parallel test run already has a processor to itself.
WORKERS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

# Classes of SASS opcodes by prefix; the first match decides.
_CLASSES = (
    ("tensor", "HMMA QMMA IMMA BMMA DMMA HGMMA QGMMA IGMMA UTCHMMA UTCQMMA UTCIMMA"),
    ("local", "LDL STL"),
    ("global", "LDG STG LDGSTS LDGDEPBAR UTMALDG UTMASTG RED ATOMG"),
    ("shared", "LDS STS LDSM STSM ATOMS LDT STT UTCCP"),
    ("special", "MUFU"),
    ("conversion", "F2F F2I I2F FRND HADD2.F32"),
    ("fp32", "FADD FMUL FFMA FSETP FSEL FMNMX FCHK FSWZADD FSET"),
    ("packed16", "HADD2 HMUL2 HFMA2 HMNMX2 HSETP2 HSET2"),
    ("move", "MOV UMOV SEL USEL R2UR R2P P2R CS2R S2R S2UR LDC ULDC LDCU SHFL PRMT UPRMT R2B B2R"),
    ("bitwise", "LOP3 ULOP3 PLOP3 UPLOP3 SHF USHF SHL SHR BREV FLO UFLO POPC UPOPC LEA ULEA BMSK SGXT"),
    ("integer", "IADD UIADD IMAD UIMAD ISETP UISETP IMNMX VIADD VIMNMX IABS IDP VIADDMNMX UIADD3 IADD3"),
    (
        "control",
        "BRA BRX EXIT BAR BSSY BSYNC BREAK CALL RET NOP WARPSYNC WARPGROUP DEPBAR FENCE MEMBAR SYNCS ELECT NANOSLEEP "
        "ERRBAR CCTL UCGABAR ACQBULK VOTE UVOTE VOTEU UTCBAR UTCATOMSWS REDUX YIELD",
    ),
)
_AMD_CLASSES = (
    ("tensor", "v_mfma"),
    ("local", "scratch_"),
    ("global", "global_ buffer_ flat_"),
    ("shared", "ds_"),
    ("special", "v_exp v_rcp v_rsq v_sqrt v_log"),
    ("conversion", "v_cvt"),
    ("move", "v_mov v_accvgpr v_cndmask v_perm s_mov s_load v_readfirstlane v_readlane v_writelane"),
    ("control", "s_branch s_cbranch s_waitcnt s_barrier s_nop s_endpgm s_set"),
    ("bitwise", "v_and v_or v_xor v_lshl v_lshr v_ashr v_bfe v_bfi v_not"),
    ("fp32", "v_add_f v_sub_f v_mul_f v_fma v_fmac v_pk_ v_max_f v_min_f v_max3_f v_min3_f v_cmp_ v_mul_legacy v_div"),
    ("integer", "v_add v_sub v_mul v_mad v_cmp v_min v_max"),
    ("scalar", "s_"),
)


# PTX instructions that multiply matrices, and the SASS opcodes that they become.
_MATRIX_PTX = {"wgmma.mma_async": "HGMMA", "mma.sync": "HMMA", "tcgen05.mma": "UTCHMMA"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel for one target.

    registers: per thread. spills: instructions that access local memory (AMD: vector registers that went to memory).
    shared: bytes per program. instructions: static counts by class, may be empty unless asked for. matrix: opcodes of
    the matrix unit.
    read, written: argument name → {bytes that a thread accesses at a time: static accesses}; AMD's machine code does
    not show which argument an access belongs to, so all are under "".
    """

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    num_warps: int
    instructions: dict[str, int]
    matrix: list[str]
    read: dict[str, dict[int, int]]
    written: dict[str, dict[int, int]]


def analyse(specialised: Specialised, mix: bool = True) -> Compiled:
    """Compile a kernel, or find it in Triton's cache, and describe it.

    ``mix``: count instructions. Without it, NVIDIA's machine code is disassembled only if it has a stack frame, since
    nothing spills without one: that takes a third of the time.
    """
    compiled = triton.compile(specialised.source(), target=specialised.gpu, options=specialised.options)
    store = get_cache_manager(hashlib.sha256(f"{compiled.hash}{_version()}".encode()).hexdigest())
    name = "analysis.json" if mix else "resources.json"
    known = store.get_file(name)
    if known is None:
        described = (_describe_amd if "amdgcn" in compiled.asm else _describe_nvidia)(specialised, compiled, mix)
        known = store.put(json.dumps(dataclasses.asdict(described)), name, binary=False)
    fields = json.loads(Path(known).read_text())
    for side in ("read", "written"):
        fields[side] = {k: {int(width): n for width, n in v.items()} for k, v in fields[side].items()}
    return Compiled(**fields)


def analyse_all(kernels: list[Specialised], mix: bool = True) -> list[Compiled]:
    """`analyse` of each, in ``WORKERS`` processes."""
    if WORKERS == 1:
        return [analyse(kernel, mix) for kernel in kernels]
    global _queue
    _queue = kernels
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("fork")) as pool:
        return list(pool.map(functools.partial(_analyse_queued, mix=mix), range(len(kernels))))


_queue: list[Specialised] = []  # what forked workers inherit: compiled functions cannot be sent to them


def _analyse_queued(index: int, mix: bool) -> Compiled:
    return analyse(_queue[index], mix)


@functools.cache
def _version() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _describe_nvidia(specialised: Specialised, compiled: Any, mix: bool) -> Compiled:
    usage = _cuobjdump(compiled.asm["cubin"], "-res-usage")
    instructions: Counter[str] = Counter()
    matrix = {opcode for name, opcode in _MATRIX_PTX.items() if name in compiled.asm["ptx"]}
    if mix or set(re.findall(r"STACK:(\d+)", usage)) != {"0"}:
        code = _cuobjdump(compiled.asm["cubin"], "-sass")
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code, re.M)
        instructions.update(_class_of(opcode, _CLASSES, exact=True) for opcode in opcodes)
        matrix = {op.split(".")[0] for op in opcodes if _class_of(op, _CLASSES, exact=True) == "tensor"}
    parameters = [
        name if kind.startswith("*") else None for name, kind in specialised.signature.items() if kind != "constexpr"
    ]
    read, written = accesses(compiled.asm["ptx"], parameters)
    return Compiled(
        kernel=specialised.kernel.fn.__name__,
        target=specialised.target,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spills=instructions["local"],
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        instructions=dict(instructions),
        matrix=sorted(matrix),
        read=read,
        written=written,
    )


def _describe_amd(specialised: Specialised, compiled: Any, _: bool) -> Compiled:
    text = compiled.asm["amdgcn"]
    found = {key: int(value) for key, value in re.findall(r"\.(vgpr(?:_spill)?_count):\s+(\d+)", text)}
    opcodes = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", text, re.M)
    read, written = Counter(), Counter()
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
    for opcode in opcodes:
        match = re.match(r"(?:global|buffer)_(load|store)_(\w+)", opcode)
        if match:
            narrow = 1 if "byte" in match[2] else 2
            (read if match[1] == "load" else written)[sizes.get(match[2], narrow)] += 1
    return Compiled(
        kernel=specialised.kernel.fn.__name__,
        target=specialised.target,
        registers=found["vgpr_count"],
        spills=found["vgpr_spill_count"],
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        instructions=dict(Counter(_class_of(opcode, _AMD_CLASSES, exact=False) for opcode in opcodes)),
        matrix=sorted({"v_mfma" for opcode in opcodes if opcode.startswith("v_mfma")}),
        read={"": dict(read)},
        written={"": dict(written)},
    )


def _class_of(opcode: str, classes: tuple[tuple[str, str], ...], exact: bool) -> str:
    if exact and opcode.startswith(("F2FP", "HADD2.F32")):
        return "conversion"
    if exact and opcode.startswith(("IMAD.MOV", "HFMA2.MOV")):
        return "move"
    stem = opcode.split(".")[0]
    for name, stems in classes:
        for each in stems.split():
            if stem == each or (stem.startswith(each) and (not exact or stem[len(each) :].isdigit())):
                return name
    return "other"


def accesses(ptx: str, parameters: list[str | None]) -> tuple[dict[str, dict[int, int]], dict[str, dict[int, int]]]:
    """(read, written) of `Compiled`: addresses are followed from the kernel's parameters through 64-bit registers.

    ``parameters``: for each that is not a constant, in order, its name if it is a pointer, else None.
    """
    roots: dict[str, set[str]] = defaultdict(set)
    steps, found = [], []
    for line in ptx.splitlines():
        match = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);", line)
        if not match:
            continue
        opcode, operands = match.groups()
        if opcode.startswith("ld.param"):
            register, index = re.match(r"(%\w+), \[\w+_param_(\d+)\]", operands).groups()
            if int(index) < len(parameters) and parameters[int(index)]:
                roots[register] = {parameters[int(index)]}
        elif opcode.startswith(("ld.global", "st.global")):
            width = re.search(r"(?:\.v(\d))?\.[a-z](\d+)$", opcode)
            size = int(width[1] or 1) * int(width[2]) // 8
            found.append((opcode[:2] == "st", re.search(r"\[\s*(%rd\d+)", operands)[1], size))
        elif opcode.startswith("tensormap.replace.tile.global_address"):  # in a descriptor, from which TMA loads
            found.append((False, re.findall(r"%rd\d+", operands)[-1], 16))
        elif opcode.startswith("cp.async.bulk"):
            continue
        elif opcode.startswith("cp.async") and "global" in opcode:
            addresses = re.findall(r"\[\s*(%r\w*\d+)", operands)
            found.append((False, addresses[1], int(re.search(r"\],\s*(0x[0-9a-f]+|\d+)", operands)[1], 0)))
        elif not opcode.startswith(("ld.", "st.")) and operands.startswith("%rd"):
            target, *sources = re.findall(r"%rd\d+", operands)
            steps.append((target, sources))
    changed = True
    while changed:
        before = sum(map(len, roots.values()))
        for target, sources in steps:
            for source in sources:
                roots[target] |= roots[source]
        changed = sum(map(len, roots.values())) > before
    sides: tuple[dict, dict] = (defaultdict(Counter), defaultdict(Counter))
    for is_store, address, size in found:
        for root in roots[address]:
            sides[is_store][root][size] += 1
    return tuple({name: dict(sizes) for name, sizes in side.items()} for side in sides)
