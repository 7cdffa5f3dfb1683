"""What one program of a launch needs of a streaming multiprocessor, found by walking its compiled code.

Counts are exact for the walked program: instructions issued, products, wavefronts of shared memory, sectors of global
memory. The serial chain is modelled: the clocks from the first to the last instruction of a program that has the
processor to itself, with assumed latencies.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

import numpy as np

from bench.static_analysis.compilation import Launch, Specialised
from bench.static_analysis.sass import ROWS, Instruction, decode
from bench.static_analysis.threads import LANES
from bench.static_analysis.walking import Program

SECTOR, LINE = 32, 128
PARAMETERS = 0x210
"""Offset of a kernel's parameters in the constant bank of sm_90."""
# Assumed clocks until a result can be read, by opcode; a global load is assumed to miss a half-loaded L2 half the time.
LATENCY = {"LDG": 600, "LDGSTS": 620, "LDL": 300, "ATOMG": 700, "LDS": 30, "LDSM": 33, "SHFL": 24}
LATENCY |= {"MUFU": 20, "HMMA": 33, "I2F": 14, "F2I": 14, "S2R": 20, "S2UR": 20, "LDC": 30, "R2UR": 10}
LATENCY["HGMMA"] = 0  # WARPGROUP.DEPBAR waits for its results
PLAIN_LATENCY, BARRIER, PRODUCT_LATENCY = 5, 20, 30
DENSE_FLOPS = 4096
"""16-bit FLOPs of warp groups per processor and clock. Products of single warps reach 0.62 of it (measured on H800 by
Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024)."""
SINGLE_WARP = 0.62
_ALU = (
    "IADD3 VIADD ISETP LOP3 SHF LEA SEL PRMT IABS VIMNMX VIADDMNMX FMNMX FSEL FSETP SGXT PLOP3 P2R R2P MOV F2FP IMNMX"
)
ALU = frozenset(_ALU.split())
SLOW = frozenset({"MUFU", "I2F", "F2I", "FRND", "F2F"})
_ITEM = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of one program.

    Attributes:
        issued: warp instructions.
        alu, slow: those of them on the integer units and on the special function units.
        tensor: clocks of the tensor cores at their dense rate.
        flops: products and sums of the matrix unit, padding included.
        shared: wavefronts (128 bytes each at most) of shared memory.
        read, written: bytes of sectors between the L2 cache and the processor.
        chain: clocks of the program when it has a processor to itself.
        opcodes: warp instructions by opcode.
    """

    issued: int
    alu: int
    slow: int
    tensor: float
    flops: int
    shared: int
    read: int
    written: int
    chain: float
    opcodes: dict[str, int]


def costs(specialised: Specialised, launch: Launch, listing: str, threads: int, cache: int) -> Costs:
    """Walk the program in the middle of a launch's grid; of persistent programs the first, which has the most tiles.

    Args:
        specialised, launch: the kernel, and arguments to run it with.
        listing: its machine code, from ``cuobjdump -sass``.
        threads: threads of a program.
        cache: bytes of the L1 cache that a program has to itself.

    Raises:
        walking.UnknownFlow: the kernel's control flow depends on values of tensors.
        NotImplementedError: it stores by TMA, whose bytes are not counted. No kernel here does: TMA only loads.
    """
    if re.search(r"\bUTMASTG\b", listing):
        raise NotImplementedError(f"{launch.name} stores by TMA, whose bytes are not counted")
    grid = (1, 1, 1) if "PROGRAMS" in launch.arguments else (*launch.grid, 1, 1)[:3]
    watcher = _Watcher(threads // LANES, cache)
    program = Program(
        decode(listing),
        threads,
        tuple(side // 2 for side in grid),
        constants(specialised, launch, threads),
        watcher.see,
    )
    watcher.program = program
    program.walk()
    return watcher.costs()


def constants(specialised: Specialised, launch: Launch, threads: int) -> dict[int, int | None]:
    """The constant bank: block and grid sizes, and the arguments. Each storage has an address of its own."""
    words: dict[int, int | None] = {0: threads, 4: 1, 8: 1}
    words |= {12 + 4 * place: side for place, side in enumerate((*launch.grid, 1, 1)[:3])}
    offset = PARAMETERS
    for name, kind in specialised.signature.items():
        if kind == "constexpr":
            continue
        size = 8 if kind.startswith("*") or kind in ("i64", "u64", "fp64") else 4
        offset += -offset % size
        value: Any = launch.arguments[name]
        if kind.startswith("*"):
            value = (value.storage + 1 << 34) + value.offset
        if isinstance(value, float):
            words |= {offset: None, offset + 4: None}
        else:
            words[offset] = int(value) & 0xFFFFFFFF
            if size == 8:
                words[offset + 4] = int(value) >> 32 & 0xFFFFFFFF
        offset += size
    return words


class _Watcher:
    """Counts the issued instructions, and tracks when each result is ready."""

    program: Program

    def __init__(self, warps: int, cache: int) -> None:
        self.warps, self.cache = warps, cache
        self.opcodes: Counter[str] = Counter()
        self.alu = self.slow = self.shared = self.flops = 0
        self.tensor = 0.0
        self.streamed = self.written = self.unknown = 0
        self.cached: list[np.ndarray] = []
        self.now = np.zeros(warps)
        self.ready = np.zeros((ROWS + 4, warps))
        self.pipe = np.zeros(warps)
        self.loads = np.zeros(warps)
        self.load_groups: list[np.ndarray] = []
        self.product_groups: list[np.ndarray] = []
        self._all = np.ones(warps, bool)

    def see(self, instruction: Instruction, warps: np.ndarray | None, lanes: np.ndarray | None) -> None:
        base = instruction.base
        count = self.warps if warps is None else int(warps.sum())
        self.opcodes[base] += count
        if base in ALU:
            self.alu += count
        elif base in SLOW:
            self.slow += count
        active = self._all if warps is None else warps
        at = np.maximum(self.now, self.ready[list(instruction.read)].max(0)) if instruction.read else self.now
        handler = _HANDLERS.get(base)
        done = at + LATENCY.get(base, PLAIN_LATENCY)
        if handler is not None:
            at, done = handler(self, instruction, at, done, active, lanes)
        now = at + 1
        self.now = now if warps is None else np.where(warps, now, self.now)
        if instruction.written:
            rows = list(instruction.written)
            self.ready[rows] = done if warps is None else np.where(warps, done, self.ready[rows])

    def costs(self) -> Costs:
        """What was counted. Repeated loads come from the L1 cache if that can hold all sectors of the program."""
        requested = sum(each.size for each in self.cached)
        distinct = np.unique(np.concatenate(self.cached)).size if self.cached else 0
        sectors = distinct if distinct * SECTOR <= self.cache else requested
        return Costs(
            issued=sum(self.opcodes.values()),
            alu=self.alu,
            slow=self.slow,
            tensor=self.tensor,
            flops=self.flops,
            shared=self.shared,
            read=SECTOR * (self.streamed + sectors + self.unknown),
            written=SECTOR * self.written,
            chain=float(self.now.max()),
            opcodes=dict(self.opcodes),
        )

    # Memory.

    def _sectors(self, instruction: Instruction, size: int, lanes: np.ndarray | None) -> list[np.ndarray]:
        """The sectors that each warp touches."""
        operand = [each for each in instruction.operands if each.kind == "address"][-1]
        addresses = self.program.addresses(operand)
        if addresses is None:  # the threads of a warp are then assumed to access adjacent items
            self.unknown += self.warps * LANES * size // SECTOR
            return []
        first = addresses // SECTOR
        found = []
        for warp in range(self.warps):
            part = slice(warp * LANES, (warp + 1) * LANES)
            some = first[part] if lanes is None else first[part][lanes[part]]
            if some.size:
                found.append(np.unique(some))
        return found

    def _wavefronts(self, operand: Any, size: int, lanes: np.ndarray | None) -> int:
        """Wavefronts of an access to shared memory by every warp: 128 bytes at a time, one word per bank."""
        addresses = self.program.addresses(operand)
        least = max(1, size // 4) * self.warps
        if addresses is None:
            return least
        together = min(LANES, LINE // max(size, 4))
        total = 0
        words = addresses // 4
        for first in range(0, LANES * self.warps, together):
            part = slice(first, first + together)
            some = words[part] if lanes is None else words[part][lanes[part]]
            if not some.size:
                continue
            each = np.unique(some[:, None] + np.arange(max(1, size // 4)))
            total += int(np.bincount(each % 32).max())
        return total

    def load(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        size = next((_ITEM[each] for each in i.modifiers if each in _ITEM), 4)
        self.cached += self._sectors(i, size, self._lanes(active, lanes))
        return at, done

    def copy(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        size = next((_ITEM[each] for each in i.modifiers if each in _ITEM), 4)
        lanes = self._lanes(active, lanes)
        predicate = next((each for each in i.sources[2:] if each.kind == "predicate"), None)
        passes = self.program.known_lanes(predicate) if predicate and predicate.text != "!PT" else None
        if predicate is not None and predicate.text == "!PT":
            passes = np.zeros(self.warps * LANES, bool)
        if passes is not None:
            lanes = passes if lanes is None else lanes & passes
        found = self._sectors(i, size, lanes)
        if "BYPASS" in i.modifiers:
            self.streamed += sum(each.size for each in found)
        else:
            self.cached += found
        self.shared += self._wavefronts(i.operands[0], size, lanes)
        self.loads = np.where(active, np.maximum(self.loads, done), self.loads)
        return at, done

    def store(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        size = next((_ITEM[each] for each in i.modifiers if each in _ITEM), 4)
        self.written += sum(each.size for each in self._sectors(i, size, self._lanes(active, lanes)))
        return at, done

    def shared_access(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        if i.base in ("LDSM", "STSM"):  # eight threads give the addresses of eight rows of 16 bytes
            matrices = int(i.modifiers[-1]) if i.modifiers[-1].isdigit() else 1
            self.shared += matrices * int(active.sum())
            return at, done
        if lanes is not None and not lanes.any():
            return at, done
        size = next((_ITEM[each] for each in i.modifiers if each in _ITEM), 4)
        operand = next(each for each in i.operands if each.kind == "address")
        self.shared += self._wavefronts(operand, size, self._lanes(active, lanes))
        return at, done

    def expect(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        """An instruction that tells a barrier how many bytes TMA copies to shared memory before it opens."""
        if i.modifiers == ("ARRIVE", "TRANS64"):
            told = np.broadcast_to(self.program.value(i.sources[-1]), self.warps * LANES)
            moved = int(told[self._lanes(active, lanes)].sum())
            self.streamed += moved // SECTOR
            self.shared += moved // LINE
        return at, done

    def _lanes(self, active: np.ndarray, lanes: np.ndarray | None) -> np.ndarray | None:
        if lanes is None and not active.all():
            return np.repeat(active, LANES)
        return lanes

    # Products.

    def product(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        """A matrix product by one warp: m16n8k16 and similar shapes."""
        shape = i.modifiers[0]
        depth = int(shape[3:]) if shape.startswith("168") else 16
        flops = 2 * 16 * 8 * depth
        scale = 2 if "TF32" in i.modifiers else 1
        warps = int(active.sum())
        self.flops += flops * warps
        self.tensor += scale * flops * warps / DENSE_FLOPS / SINGLE_WARP
        clocks = scale * flops / (DENSE_FLOPS / 4) / SINGLE_WARP
        start = np.maximum(at, self.pipe)
        self.pipe = np.where(active, start + clocks, self.pipe)
        return start, start + LATENCY["HMMA"]

    def group_product(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        """A matrix product by a group of four warps; WARPGROUP.DEPBAR waits for its end."""
        rows, columns, depth = (int(each) for each in i.modifiers[0].split("x"))
        scale = 2 if "TF32" in i.modifiers else 1
        groups = int(active.sum()) / 4
        flops = 2 * rows * columns * depth
        clocks = scale * flops / DENSE_FLOPS
        bytes_of = 32 * (columns + (rows if i.operands[1].kind == "name" else 0))
        self.flops += int(flops * groups)
        self.tensor += clocks * groups
        self.shared += int(groups * bytes_of / LINE)
        start = np.maximum(at, self.pipe)
        end = start + max(clocks, bytes_of / LINE)
        self.pipe = np.where(active, end, self.pipe)
        if i.operands[-1].text == "gsb0":
            self.product_groups.append(np.where(active, self.pipe + PRODUCT_LATENCY, 0))
        return at, done

    # Waiting.

    def commit(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        self.load_groups.append(np.where(active, self.loads, 0))
        return at, done

    def wait_loads(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        return self._wait(self.load_groups, i, at), done

    def wait_products(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        return (self._wait(self.product_groups, i, at) if "DEPBAR" in i.modifiers else at), done

    def _wait(self, groups: list[np.ndarray], i: Instruction, at: np.ndarray) -> np.ndarray:
        pending = i.operands[-1].value
        if len(groups) > pending:
            at = np.maximum(at, np.max(groups[: len(groups) - pending], axis=0))
            del groups[: max(0, len(groups) - pending - 1)]
        return at

    def barrier(self, i: Instruction, at: np.ndarray, done: np.ndarray, active: Any, lanes: Any) -> tuple:
        return np.where(active, at[active].max(initial=0) + BARRIER, at), done


_HANDLERS = {
    "LDG": _Watcher.load,
    "LDGSTS": _Watcher.copy,
    "STG": _Watcher.store,
    "LDS": _Watcher.shared_access,
    "STS": _Watcher.shared_access,
    "LDSM": _Watcher.shared_access,
    "STSM": _Watcher.shared_access,
    "HMMA": _Watcher.product,
    "HGMMA": _Watcher.group_product,
    "LDGDEPBAR": _Watcher.commit,
    "DEPBAR": _Watcher.wait_loads,
    "WARPGROUP": _Watcher.wait_products,
    "BAR": _Watcher.barrier,
    "SYNCS": _Watcher.expect,
}
