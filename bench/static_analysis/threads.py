"""The threads of a program as a walk knows them: integers and predicates for each thread, or "not known"."""

from __future__ import annotations

import numpy as np

from bench.static_analysis.sass import CONSTANT, ROWS, TRUE, UNIFORM_TRUE, Instruction, Operand

LANES = 32


class Threads:
    """Registers of all threads of a program.

    Args:
        threads: threads of a program.
        place: the program's indices in the grid.
        constants: 32-bit words of the constant bank, by their offset; None where a word is not known.

    Attributes:
        table: a row for each register and predicate (sass.py), a column for each thread.
        known: which rows hold the values that the machine would have.
        local: spilled values, by offset.
        active: the threads that execute the current instruction; None for all of them.
        shared: bytes of shared memory with known values, such as orders to warps that have other tasks.
    """

    def __init__(self, threads: int, place: tuple[int, int, int], constants: dict[int, int | None]) -> None:
        self.threads, self.place, self.constants = threads, place, constants
        self.table = np.zeros((ROWS + 3, threads), np.uint32)
        self.table[[TRUE, UNIFORM_TRUE]] = 1
        self.known = np.ones(ROWS + 3, bool)
        self.local: dict[int, np.ndarray | None] = {}
        self.active: np.ndarray | None = None
        self.shared: dict[int, int] = {}

    def pair(self, row: int) -> np.ndarray:
        """The 64 bits of a register and the one after it."""
        high = self.table[row + 1] if row not in CONSTANT else self.table[row]
        return self.table[row].astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))

    def value(self, operand: Operand) -> np.ndarray:
        """An operand's 32 bits for every thread."""
        if operand.kind == "number":
            return np.uint32(operand.value & 0xFFFFFFFF)
        found = (self.constants.get(operand.value) or 0) if operand.kind == "constant" else self.table[operand.row]
        found = np.uint32(found)
        if operand.kind == "predicate":
            return found ^ np.uint32(operand.inverted)
        found = np.where(found.view(np.int32) < 0, -found, found) if operand.absolute else found
        found = -found if operand.negative else found
        return ~found if operand.inverted else found

    def wide(self, operand: Operand) -> np.ndarray:
        """An operand's 64 bits."""
        if operand.kind == "constant":
            low, high = (self.constants.get(operand.value + at) or 0 for at in (0, 4))
            return np.uint64(low | high << 32)
        if operand.kind == "register" and operand.row not in CONSTANT:
            return self.pair(operand.row)
        return np.uint64(np.int64(operand.value) if operand.kind == "number" else 0)

    def addresses(self, operand: Operand) -> np.ndarray | None:
        """Every thread's address, or None if it is not known."""
        if not all(self.known[row] and (not operand.wide or self.known[row + 1]) for row in operand.rows):
            return None
        total = np.full(self.threads, operand.value, np.int64)
        for place, row in enumerate(operand.rows):
            if place == 0 and operand.wide:
                total += self.pair(row).view(np.int64)
            else:
                total += self.table[row].view(np.int32)
        return total

    def known_lanes(self, operand: Operand | None) -> np.ndarray | None:
        """The threads for which a predicate holds; None for all of them, or if it is not known."""
        if operand is None or not self.known[operand.row]:
            return None
        return (self.table[operand.row] != 0) ^ operand.inverted

    def store_local(self, instruction: Instruction) -> None:
        """Store a spill, which every thread writes to the same offset in its own memory."""
        address, value = instruction.sources[:2]
        for n in range(instruction.words):
            row = value.row + n if value.row not in CONSTANT else value.row
            self.local[address.value + 4 * n] = self.table[row].copy() if self.known[row] else None

    def store_shared(self, instruction: Instruction) -> None:
        """Keep the bytes that go to shared memory; forget what an unknown value may have replaced."""
        address, value = instruction.sources[:2]
        where = self.addresses(address)
        some = slice(None) if self.active is None else self.active
        if where is None or not where[some].size:
            return
        where, size = where[some], 4 * instruction.words
        rows = [value.row + n if value.row not in CONSTANT else value.row for n in range(instruction.words)]
        if not self.known[rows].all():
            first, last = where.min(), where.max() + size
            self.shared = {at: byte for at, byte in self.shared.items() if not first <= at < last}
            return
        for n, row in enumerate(rows):
            for at, word in set(zip(where.tolist(), self.table[row][some].tolist(), strict=True)):
                self.shared |= {at + 4 * n + byte: word >> 8 * byte & 255 for byte in range(4)}

    def load_shared(self, operand: Operand, size: int) -> np.ndarray | None:
        """The number of ``size`` bytes that each thread loads; None if any is not known."""
        where = self.addresses(operand)
        if where is None or not self.shared:
            return None
        some = slice(None) if self.active is None else self.active
        numbers = {at: [self.shared.get(at + byte) for byte in range(size)] for at in set(where[some].tolist())}
        if any(None in each for each in numbers.values()):
            return None
        return np.array([int.from_bytes(numbers.get(at, b""), "little") for at in where.tolist()], np.uint32)
