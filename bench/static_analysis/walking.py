"""Walk the machine code of one program: which instructions it executes, how often, and what memory they access.

Integers, predicates and addresses are computed for every thread, since loops and masks follow from them. Values of
tensors are unknown: floating-point instructions, and what is loaded, only mark their results as unknown. A kernel whose
control flow depends on such a value cannot be walked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.static_analysis.meanings import MEANINGS
from bench.static_analysis.sass import CONSTANT, INSTRUCTION_BYTES, PREDICATES, ROWS, Instruction
from bench.static_analysis.threads import LANES, Threads

_BRANCHES = ("BAR", "EXIT", "BRA", "CALL", "RET", "BRX")


class UnknownFlow(ValueError):
    """A branch depends on a value that is not computed here."""


class Program(Threads):
    """The threads of one program, their registers, and the walk through the code.

    Args:
        code: the instructions.
        threads: threads of a program.
        place: the program's indices in the grid.
        constants: 32-bit words of the constant bank, by their offset; None where a word is not known.
        watcher: called with (instruction, warps, lanes) as each is issued, in order: warps is a mask over warps, or
            None for all; lanes is a mask over threads whose guard holds, or None for all.
    """

    def __init__(
        self,
        code: list[Instruction],
        threads: int,
        place: tuple[int, int, int],
        constants: dict[int, int | None],
        watcher: Callable[[Instruction, np.ndarray | None, np.ndarray | None], None],
    ) -> None:
        super().__init__(threads, place, constants)
        self.code, self.watcher = code, watcher
        self.warps = threads // LANES
        self._all = np.ones(threads, bool)
        self._steps = [self._step(each) for each in code]

    def walk(self, most: int = 3_000_000) -> None:
        """Walk from the first instruction to the end of every thread.

        Threads at the lowest address go first, so that diverged threads meet again.

        Raises:
            UnknownFlow: a branch depends on a value that is not known.
            ValueError: more than ``most`` instructions.
        """
        groups = {0: self._all.copy()}
        waiting: dict[int, dict[int, np.ndarray]] = {}  # by barrier: where its threads continue
        alive = self._all.copy()
        while groups or waiting:
            if not groups:  # threads that wait for ended ones continue
                for there in waiting.values():
                    self._join(groups, there)
                waiting = {}
            address = min(groups)
            mask = groups.pop(address)
            stop = min(groups, default=1 << 60)
            whole = bool(mask.all())
            place = address // INSTRUCTION_BYTES
            while True:
                if place * INSTRUCTION_BYTES == stop:
                    self._join(groups, {stop: mask})
                    break
                instruction = self.code[place]
                active = None if whole else mask
                most -= 1
                if most < 0:
                    raise ValueError("a program executes more instructions than are walked")
                if not instruction.base.startswith(_BRANCHES):
                    self._steps[place](active)
                    place += 1
                    continue
                lanes = self._guard(instruction)
                taken = mask if lanes is None else mask & lanes
                self.watcher(instruction, self._warps(active), None if lanes is None and whole else taken)
                if instruction.base == "BAR":
                    place += 1
                    name = instruction.operands[0].value if instruction.operands[0].kind == "number" else -1
                    self._join(waiting.setdefault(name, {}), {place * INSTRUCTION_BYTES: mask})
                    full = int(alive.sum())
                    if len(instruction.operands) > 1 and instruction.operands[1].kind == "number":
                        full = min(full, instruction.operands[1].value)
                    if sum(int(some.sum()) for some in waiting[name].values()) >= full:
                        self._join(groups, waiting.pop(name))
                    break
                rest = mask & ~taken
                if instruction.base == "EXIT":
                    alive &= ~taken
                    targets = {}
                else:
                    targets = self._targets(instruction, taken)
                if rest.any():
                    targets[(place + 1) * INSTRUCTION_BYTES] = rest
                if len(targets) == 1 and next(iter(targets)) < stop:
                    place = next(iter(targets)) // INSTRUCTION_BYTES
                    mask = next(iter(targets.values()))
                    whole = bool(mask.all())
                    continue
                self._join(groups, targets)
                break

    def _join(self, groups: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> None:
        for address, mask in others.items():
            groups[address] = groups.get(address, ~self._all) | mask

    def _warps(self, mask: np.ndarray | None) -> np.ndarray | None:
        return None if mask is None else mask.reshape(self.warps, LANES).any(1)

    def _guard(self, instruction: Instruction) -> np.ndarray | None:
        """The threads that a branch's conditions let pass; None for all."""
        found = None
        conditions = [] if instruction.guard is None else [instruction.guard]
        conditions += [each for each in instruction.operands if each.kind == "predicate"]
        for each in conditions:
            if not self.known[each.row]:
                raise UnknownFlow(f"{instruction.opcode} at {instruction.address:#x} depends on {each.text}, not known")
            lanes = (self.table[each.row] != 0) ^ each.inverted
            found = lanes if found is None else found & lanes
        return found

    def _targets(self, instruction: Instruction, taken: np.ndarray) -> dict[int, np.ndarray]:
        if not taken.any() or "DIV" in instruction.modifiers:  # for diverged threads; here none are
            return {(instruction.address + INSTRUCTION_BYTES): taken} if taken.any() else {}
        if instruction.base == "RET":
            row = int(instruction.operands[0].text.split()[0].strip("R"))
            return {int(each): taken & (self.table[row] == each) for each in np.unique(self.table[row][taken])}
        numbers = [each.value for each in instruction.operands if each.kind == "number"]
        if not numbers:
            raise UnknownFlow(f"{instruction.opcode} at {instruction.address:#x} has no fixed target")
        return {numbers[-1]: taken}

    def _step(self, instruction: Instruction) -> Callable[[np.ndarray | None], None]:
        """The function that executes an instruction for the active threads."""
        guard, results = instruction.guard, [row for row in instruction.written if row < ROWS]
        value = MEANINGS.get(instruction.base)
        reads = [row for row in instruction.read if guard is None or row != guard.row]
        if instruction.base in ("P2R", "R2P"):
            last = instruction.sources[-1]
            bits = last.value if instruction.base == "P2R" and last.kind == "number" else 0x7F
            reads = [PREDICATES + bit for bit in range(7) if bits >> bit & 1] + reads
        watch, table, known = self.watcher, self.table, self.known

        def run(active: np.ndarray | None) -> None:
            lanes = self.known_lanes(guard)
            mask = active if lanes is None else lanes if active is None else active & lanes
            self.active = mask
            watch(instruction, self._warps(active), mask)
            if instruction.base == "STL":
                self.store_local(instruction)
            elif instruction.base == "STS":
                self.store_shared(instruction)
            if not results or (mask is not None and not mask.any()):
                return
            sure = guard is None or known[guard.row]
            if value is None or not sure or not (known[reads].all() or instruction.base == "LDL"):
                known[results] = False
                return
            found = value(self, instruction)
            if found is None:
                known[results] = False
                return
            for row, new in found:
                if row in CONSTANT:
                    continue
                if new is None:
                    known[row] = False
                elif mask is None:
                    table[row] = new
                    known[row] = True
                else:
                    # Values of the other threads may be unknown, but these will hardly read them.
                    np.copyto(table[row], new, where=mask, casting="unsafe")
                    known[row] = True

        return run
