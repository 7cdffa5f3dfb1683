"""NVIDIA's machine code as text, decoded: instructions, operands, and which registers each reads and writes.

Registers are rows of one table: R0 … R254 and the zero register RZ, the uniform UR0 … UR62 and URZ, then the predicates
P0 … P6 and PT, UP0 … UP6 and UPT.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable

ZERO, UNIFORM, UNIFORM_ZERO = 255, 256, 319
PREDICATES, TRUE, UNIFORM_TRUE = 320, 327, 335
ROWS = 336
CONSTANT = frozenset({ZERO, UNIFORM_ZERO, TRUE, UNIFORM_TRUE})
INSTRUCTION_BYTES = 16

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_REGISTER = re.compile(r"(U?)R(Z|\d+)(\.64|\.reuse|\.X\d+|\.H\d_H\d|\.B\d|\.U32)*")
_PREDICATE = re.compile(r"(U?)P(T|\d)")
# 32-bit words: of a result or a stored value, by modifier; of the sources of matrix products, in order.
_WORDS = {"64": 2, "128": 4, "WIDE": 2}
_SOURCES = {"HMMA": (4, 2, 4), "HGMMA": (4, 4, 4), "STSM": (1, 4, 1)}
_NO_RESULT = ("ST", "BAR", "BRA", "EXIT", "RET", "CALL", "DEPBAR", "FENCE", "MEMBAR", "NOP", "WARP", "BSSY", "BSYNC")
_NO_RESULT += ("LDGSTS", "LDGDEPBAR", "UTMASTG", "UTMALDG", "RED", "ERRBAR", "CCTL", "NANOSLEEP", "BREAK")


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand. ``kind``: "register", "predicate", "number", "constant" (of bank 0), "address" or "name".

    ``row``: the row of a register or predicate. ``value``: a number, or the offset of a constant. ``rows``: registers
    of an address, the first of which may be 64 bits wide (``wide``); an address is their sum plus ``value``.
    """

    text: str
    kind: str
    row: int = -1
    value: int = 0
    rows: tuple[int, ...] = ()
    wide: bool = False
    negative: bool = False
    inverted: bool = False
    absolute: bool = False


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its guard (a predicate or None), the opcode with and without modifiers."""

    address: int
    guard: Operand | None
    opcode: str
    operands: tuple[Operand, ...]

    @functools.cached_property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".", 1)[0]

    @functools.cached_property
    def modifiers(self) -> tuple[str, ...]:
        """What follows the opcode, between dots."""
        return tuple(self.opcode.split(".")[1:])

    @functools.cached_property
    def words(self) -> int:
        """32-bit registers of the result, or of what a store writes."""
        if self.base in ("LDSM", "STSM"):
            return int(self.modifiers[-1]) if self.modifiers[-1].isdigit() else 1
        if self.base == "HMMA":
            return 4
        if self.base == "HGMMA":
            return int(self.modifiers[0].split("x")[1]) // 2
        if self.base == "CS2R":
            return 1 if "32" in self.modifiers else 2
        return max((_WORDS.get(each, 1) for each in self.modifiers), default=1)

    @functools.cached_property
    def results(self) -> tuple[Operand, ...]:
        """The operands that it writes: a register, and predicates before and after it."""
        if self.base.startswith(_NO_RESULT):
            return ()
        kinds = [each.kind for each in self.operands] + [""]
        leading = 1 if self.base.startswith("VOTE") else 2
        count = 0
        while count < leading and kinds[count] == "predicate":
            count += 1
        if not self.base.endswith(("SETP", "PLOP3")) and kinds[count] == "register":
            count += 1
            while kinds[count] == "predicate":
                count += 1
        return self.operands[:count]

    @functools.cached_property
    def sources(self) -> tuple[Operand, ...]:
        """The operands that it reads."""
        return self.operands[len(self.results) :]

    @functools.cached_property
    def written(self) -> tuple[int, ...]:
        """Rows that it writes."""
        sizes = [self.words if each.kind == "register" else 1 for each in self.results]
        return _rows((each.row, size) for each, size in zip(self.results, sizes, strict=True))

    @functools.cached_property
    def read(self) -> tuple[int, ...]:
        """Rows that it reads, its guard's among them."""
        found = [] if self.guard is None else [(self.guard.row, 1)]
        for place, each in enumerate(self.sources):
            if each.kind == "address":
                found += [(row, 1 + (each.wide and row < UNIFORM)) for row in each.rows]
            elif each.kind in ("register", "predicate"):
                wide = "WIDE" in self.modifiers and place == 2
                found.append((each.row, _SOURCES.get(self.base, (1 + wide,) * 3)[min(place, 2)]))
        if self.base in ("STG", "STS", "STL"):
            found += [(each.row, self.words) for each in self.sources if each.kind == "register"]
        return _rows(found)


def _rows(spans: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The rows of (first, count) spans, without those whose value never changes."""
    found = {row for first, count in spans for row in range(first, first + count)}
    return tuple(sorted(found - CONSTANT))


def decode(listing: str) -> list[Instruction]:
    """The instructions of the only function in what ``cuobjdump -sass`` printed, by address.

    Raises:
        ValueError: the listing has gaps, or holds no instruction.
    """
    found = []
    for address, guard, opcode, operands in _LINE.findall(listing):
        texts = [each.strip() for each in _split(operands)]
        found.append(
            Instruction(
                int(address, 16),
                _operand(guard) if guard else None,
                opcode,
                tuple(_operand(each) for each in texts if each),
            )
        )
    if not found or any(each.address != INSTRUCTION_BYTES * place for place, each in enumerate(found)):
        raise ValueError("expected the listing of one function, found gaps, several functions or no instruction")
    return found


def _split(text: str) -> list[str]:
    """Split a text at commas outside of brackets."""
    return re.split(r",(?![^\[]*\])", text)


@functools.cache
def _operand(text: str) -> Operand:
    """The operand in a text; anything of an unknown kind is a "name"."""
    negative, inverted = text.startswith("-"), text.startswith(("!", "~"))
    bare = text.lstrip("-!~").replace(".reuse", "")
    absolute = bare.startswith("|")
    bare = bare.strip("|")
    marks = {"negative": negative, "inverted": inverted, "absolute": absolute}
    if match := _PREDICATE.fullmatch(bare):
        return Operand(
            text, "predicate", PREDICATES + 8 * bool(match[1]) + (7 if match[2] == "T" else int(match[2])), **marks
        )
    if match := _REGISTER.fullmatch(bare):
        return Operand(text, "register", _row(match), **marks)
    if re.fullmatch(r"0x[0-9a-f]+|\d+", bare):
        value = int(bare, 0)
        return Operand(text, "number", value=-value if negative else value)
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\](\.\w+)*", bare):
        return Operand(text, "constant", value=int(match[1], 16), **marks)
    if match := re.fullmatch(r"(?:desc\[\w+\])?\[([^\[\]]*)\](\.\w+)*", bare):
        parts = re.findall(r"([+-]*)([^+-]+)", match[1])
        registers = [_REGISTER.fullmatch(part) for _, part in parts]
        rows = tuple(_row(each) for each in registers if each)
        numbers = [-int(n, 0) if "-" in s else int(n, 0) for s, n in parts if re.fullmatch(r"0x[0-9a-f]+|\d+", n)]
        wide = any(each and ".64" in each[0] for each in registers)
        return Operand(text, "address", value=sum(numbers), rows=rows, wide=wide)
    return Operand(text, "name")


def _row(match: re.Match[str]) -> int:
    number = (63 if match[1] else ZERO) if match[2] == "Z" else int(match[2])
    return number + (256 if match[1] else 0)
