"""What instructions compute, as far as loops, masks and addresses depend on it: integers, predicates, and divisions of
integers in floating point.

A meaning returns (row, value) of each result, with None for an unknown value, or None if all results are unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bench.static_analysis.sass import PREDICATES, ZERO, Instruction, Operand
from bench.static_analysis.threads import LANES, Threads

_LOW = np.uint64(0xFFFFFFFF)
_COMPARE = {"LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal}
_COMPARE |= {"EQ": np.equal, "NE": np.not_equal}

Found = Iterable[tuple[int, Any]] | None
Meaning = Callable[[Threads, Instruction], Found]


def _signed(value: np.ndarray) -> np.ndarray:
    return np.asarray(value).astype(np.uint32).view(np.int32)


def _integer(p: Threads, operand: Operand) -> np.ndarray:
    return _signed(p.value(operand))


def _parts(instruction: Instruction) -> tuple[list[int], list[int]]:
    """Rows of registers and of predicates among the results."""
    registers = [each.row for each in instruction.results if each.kind == "register"]
    return registers, [each.row for each in instruction.results if each.kind == "predicate"]


def _split(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = np.asarray(total).astype(np.uint64)
    return (total & _LOW).astype(np.uint32), (total >> np.uint64(32)).astype(np.uint32)


def _move(p: Threads, i: Instruction) -> Found:
    return [(i.results[0].row, p.value(i.sources[0]))]


def _half_constants(p: Threads, i: Instruction) -> Found:
    """A product of zeros, with which the compiler makes two 16-bit constants, the upper one first."""
    if len(i.sources) != 4 or {each.row for each in i.sources[:2]} != {ZERO}:
        return None
    upper, lower = (int(_float(p, each).astype(np.float16).view(np.uint16)) for each in i.sources[2:])
    return [(i.results[0].row, np.uint32(upper << 16 | lower))]


def _zeros(p: Threads, i: Instruction) -> Found:
    if i.sources[0].text != "SRZ":
        return None
    return [(row, np.uint32(0)) for row in i.written]


def _special(p: Threads, i: Instruction) -> Found:
    name = i.sources[0].text
    row = i.results[0].row
    if name.startswith("SR_CTAID."):
        return [(row, np.uint32(p.place["XYZ".index(name[-1])]))]
    if name == "SR_TID.X":
        return [(row, np.arange(p.threads, dtype=np.uint32))]
    if name == "SR_LANEID":
        return [(row, np.arange(p.threads, dtype=np.uint32) % LANES)]
    if name in ("SR_CgaCtaId", "SR_TID.Y", "SR_TID.Z"):
        return [(row, np.uint32(0))]
    return None


def _load_constant(p: Threads, i: Instruction) -> Found:
    if i.sources[0].kind != "constant":
        return None
    words = [p.constants.get(i.sources[0].value + 4 * n, 0) for n in range(len(i.written))]
    return [(row, None if word is None else np.uint32(word)) for row, word in zip(i.written, words, strict=True)]


def _load_local(p: Threads, i: Instruction) -> Found:
    return [(row, p.local.get(i.sources[0].value + 4 * n)) for n, row in enumerate(i.written)]


def _load_shared(p: Threads, i: Instruction) -> Found:
    if i.words > 1:
        return None
    found = p.load_shared(i.sources[0], 1 if "U8" in i.modifiers else 4)
    return None if found is None else [(i.results[0].row, found)]


def _add(p: Threads, i: Instruction) -> Found:
    (row,), carries = _parts(i)
    terms = [each for each in i.sources if each.kind != "predicate"]
    total = np.zeros(p.threads, np.uint64)
    for each in terms:
        if each.negative and each.kind != "number":
            positive = p.value(each)  # −x is ~x + 1, whose carry counts
            bare = ~(~positive + np.uint32(1)) if False else positive
            total = total + np.where(bare == 0, np.uint64(1 << 32), bare.astype(np.uint64))
        else:
            total = total + p.value(each).astype(np.uint64)
    for each in i.sources:
        if each.kind == "predicate" and "X" in i.modifiers:
            total = total + p.value(each).astype(np.uint64)
    low, high = _split(total)
    return [(row, low), *((carry, (high > rank).astype(np.uint32)) for rank, carry in enumerate(carries))]


def _multiply_add(p: Threads, i: Instruction) -> Found:
    (row, *_), carries = _parts(i)
    a, b, c = i.sources[:3]
    if "WIDE" not in i.modifiers and "HI" not in i.modifiers:
        total = p.value(a) * p.value(b) + p.value(c)
        if "X" in i.modifiers:
            total = total + p.value(i.sources[3])
        return [(row, total)]
    if "U32" in i.modifiers:
        product = p.value(a).astype(np.uint64) * p.value(b).astype(np.uint64)
    else:
        product = (_signed(p.value(a)).astype(np.int64) * _signed(p.value(b)).astype(np.int64)).view(np.uint64)
    total = product + p.wide(c)
    carry = total < product
    if "X" in i.modifiers and len(i.sources) > 3:
        total = total + p.value(i.sources[3]).astype(np.uint64)
    low, high = _split(total)
    outs = [(each, carry.astype(np.uint32)) for each in carries]
    return [(row, high), *outs] if "HI" in i.modifiers else [(row, low), (row + 1, high), *outs]


def _shift_add(p: Threads, i: Instruction) -> Found:
    (row,), carries = _parts(i)
    sources = list(i.sources)
    carry_in = sources.pop() if "X" in i.modifiers else None
    shift = np.uint64(sources[-1].value)
    a, b = sources[0], sources[1]
    if "HI" in i.modifiers:
        if "SX32" in i.modifiers:
            value = _signed(p.value(a)).astype(np.int64).view(np.uint64)
        else:
            value = p.value(a).astype(np.uint64) | (p.value(sources[2]).astype(np.uint64) << np.uint64(32))
        value = (value << shift) >> np.uint64(32)
    else:
        value = (p.value(a).astype(np.uint64) << shift) & _LOW
    total = (value & _LOW) + p.value(b).astype(np.uint64)
    if carry_in is not None:
        total = total + p.value(carry_in).astype(np.uint64)
    low, high = _split(total)
    return [(row, low), *((carry, (high > 0).astype(np.uint32)) for carry in carries)]


def _logic(p: Threads, i: Instruction) -> Found:
    registers, predicates = _parts(i)
    a, b, c = (p.value(each) for each in i.sources[:3])
    table = i.sources[3].value
    total = np.zeros(p.threads, np.uint32)
    for bit in range(8):
        if table >> bit & 1:
            total |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    return [*((row, total) for row in registers), *((row, (total != 0).astype(np.uint32)) for row in predicates)]


def _predicate_logic(p: Threads, i: Instruction) -> Found:
    a, b, c = (p.value(each) != 0 for each in i.sources[:3])
    found = []
    for place, each in enumerate(i.results):
        table = i.sources[3 + place].value
        total = np.zeros(p.threads, bool)
        for bit in range(8):
            if table >> bit & 1:
                total |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
        found.append((each.row, total.astype(np.uint32)))
    return found


def _compare(p: Threads, i: Instruction) -> Found:
    kind = i.modifiers[0].removesuffix("U") if i.base == "FSETP" else i.modifiers[0]
    if kind not in _COMPARE:
        return None
    read = _float if i.base == "FSETP" else Threads.value if "U32" in i.modifiers else _integer
    a, b = (read(p, each) for each in i.sources[:2])
    found = _COMPARE[kind](a, b)
    if "EX" in i.modifiers:  # the upper words of 64-bit numbers; the lower ones were compared before
        strict = {"LE": np.less, "GE": np.greater}.get(kind, _COMPARE[kind])
        lower = p.value(i.sources[3]) != 0
        found = (a != b) | lower if kind == "NE" else np.where(a == b, lower, strict(a, b))
    other = p.value(i.sources[2]) != 0
    joined = []
    for place, each in enumerate(i.results):
        this = ~found if place else found
        this = this | other if "OR" in i.modifiers else this ^ other if "XOR" in i.modifiers else this & other
        joined.append((each.row, np.broadcast_to(this, p.threads).astype(np.uint32)))
    return joined


def _select(p: Threads, i: Instruction) -> Found:
    a, b, which = i.sources
    read = _float if i.base == "FSEL" else Threads.value
    chosen = np.where(p.value(which) != 0, read(p, a), read(p, b))
    return [(i.results[0].row, chosen.view(np.uint32))]


def _least(p: Threads, i: Instruction) -> Found:
    sources = list(i.sources)
    values = [p.value(each) for each in sources[:-1]]
    if i.base == "VIADDMNMX":
        values = [values[0] + values[1], values[2]]
    a, b = (each if "U32" in i.modifiers else _signed(each) for each in values)
    least = np.where(p.value(sources[-1]) != 0, np.minimum(a, b), np.maximum(a, b))
    return [(i.results[0].row, least.astype(np.int64).astype(np.uint32))]


def _absolute(p: Threads, i: Instruction) -> Found:
    return [(i.results[0].row, np.abs(_signed(p.value(i.sources[0])).astype(np.int64)).astype(np.uint32))]


def _shift(p: Threads, i: Instruction) -> Found:
    low, by, high = (p.value(each).astype(np.uint64) for each in i.sources)
    upper, modifiers = "HI" in i.modifiers, i.modifiers
    by = np.minimum(by, np.uint64(63 if "U64" in modifiers or "S64" in modifiers else 32))
    value = low | (high << np.uint64(32))
    if modifiers[0] == "L":
        found = value << by if upper else low << by
        found = found >> np.uint64(32) if upper else found
    elif "S32" in modifiers or "S64" in modifiers:
        if upper:
            found = (_signed(high).astype(np.int64) >> by.astype(np.int64)).view(np.uint64)
        else:
            found = (value.view(np.int64) >> by.astype(np.int64)).view(np.uint64)
    else:
        found = high >> by if upper else value >> by
    return [(i.results[0].row, _split(found)[0])]


def _extend(p: Threads, i: Instruction) -> Found:
    bits = i.sources[1].value
    value = p.value(i.sources[0]) & np.uint32((1 << bits) - 1)
    if "U32" not in i.modifiers:
        value = (value ^ np.uint32(1 << bits - 1)) - np.uint32(1 << bits - 1)
    return [(i.results[0].row, value)]


def _permute(p: Threads, i: Instruction) -> Found:
    a, picks, b = i.sources
    if picks.kind != "number":
        return None
    both = p.value(a).astype(np.uint64) | (p.value(b).astype(np.uint64) << np.uint64(32))
    total = np.zeros(p.threads, np.uint32)
    for place in range(4):
        pick = picks.value >> 4 * place & 15
        byte = ((both >> np.uint64(8 * (pick & 7))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(byte > 127, np.uint32(255), np.uint32(0)) if pick & 8 else byte
        total |= byte << np.uint32(8 * place)
    return [(i.results[0].row, total)]


def _predicates_to_register(p: Threads, i: Instruction) -> Found:
    total = np.zeros(p.threads, np.uint32)
    for bit in range(7):
        total |= p.table[PREDICATES + bit] << np.uint32(bit)
    mask = p.value(i.sources[-1])
    return [(i.results[0].row, (total & mask) | (p.value(i.sources[1]) & ~mask))]


def _register_to_predicates(p: Threads, i: Instruction) -> Found:
    value, mask = p.value(i.sources[1]), i.sources[-1].value
    return [(PREDICATES + bit, value >> np.uint32(bit) & np.uint32(1)) for bit in range(7) if mask >> bit & 1]


def _to_float(p: Threads, i: Instruction) -> Found:
    source = i.sources[0]
    wide, unsigned = "U64" in i.modifiers, "U32" in i.modifiers or "U64" in i.modifiers
    value = p.wide(source) if wide else p.value(source)
    value = np.broadcast_to(value if unsigned else _signed(value), p.threads).astype(np.float64)
    near = value.astype(np.float32)
    if "RP" in i.modifiers:
        near = np.where(near < value, np.nextafter(near, np.float32(math.inf)), near)
    return [(i.results[0].row, near.view(np.uint32))]


def _float(p: Threads, operand: Operand) -> np.ndarray:
    if operand.kind in ("number", "name"):
        return np.float32(float(operand.text.replace("QNAN", "nan")))
    bits = (p.constants.get(operand.value) or 0) if operand.kind == "constant" else p.table[operand.row]
    value = np.array(bits, np.uint32).view(np.float32)
    value = np.abs(value) if operand.absolute else value
    return -value if operand.negative else value


def _float_arithmetic(p: Threads, i: Instruction) -> Found:
    """Arithmetic of kernels that divide integers in floating point."""
    if any(each.text.startswith(("0x", "-0x")) for each in i.sources):
        return None
    values = [_float(p, each).astype(np.float64) for each in i.sources if each.kind != "predicate"]
    with np.errstate(all="ignore"):
        total = values[0] + values[1] if i.base == "FADD" else values[0] * values[1]
        total = total + values[2] if i.base == "FFMA" else total
        return [(i.results[0].row, np.asarray(total).astype(np.float32).view(np.uint32))]


def _reciprocal(p: Threads, i: Instruction) -> Found:
    if "RCP" not in i.modifiers:
        return None
    with np.errstate(all="ignore"):
        return [(i.results[0].row, np.asarray(np.float32(1) / _float(p, i.sources[0])).view(np.uint32))]


def _to_integer(p: Threads, i: Instruction) -> Found:
    with np.errstate(all="ignore"):
        value = np.nan_to_num(_float(p, i.sources[0]).astype(np.float64))
        value = np.floor(value) if "FLOOR" in i.modifiers else value
    if "U64" in i.modifiers:
        low, high = _split(np.clip(value, 0, 2.0**63).astype(np.uint64))
        return [(i.results[0].row, low), (i.results[0].row + 1, high)]
    most = 2.0**32 - 1 if "U32" in i.modifiers else 2.0**31 - 1
    return [(i.results[0].row, np.clip(value, -(2.0**31), most).astype(np.int64).astype(np.uint32))]


def _shuffle(p: Threads, i: Instruction) -> Found:
    if "IDX" not in i.modifiers or i.sources[1].kind not in ("number", "register"):
        return None
    lane = np.broadcast_to(p.value(i.sources[1]), p.threads).astype(np.int64) % LANES
    base = np.arange(p.threads) // LANES * LANES
    registers, predicates = _parts(i)
    return [(registers[0], p.value(i.sources[0])[base + lane]), *((row, np.uint32(1)) for row in predicates)]


def _elect(p: Threads, i: Instruction) -> Found:
    registers, predicates = _parts(i)
    first = (np.arange(p.threads) % LANES == 0).astype(np.uint32)
    return [*((row, first) for row in predicates), *((row, np.uint32(0)) for row in registers)]


def _vote(p: Threads, i: Instruction) -> Found:
    registers, predicates = _parts(i)
    sources = [each for each in i.sources if each.kind == "predicate"]
    votes = np.broadcast_to(p.value(sources[-1]) != 0, p.threads).reshape(-1, LANES)
    joined = votes.all(1) if "ALL" in i.modifiers else votes.any(1)
    bits = (votes.astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum(1).astype(np.uint32)
    found = [(row, np.repeat(joined, LANES).astype(np.uint32)) for row in predicates]
    return found + [(row, np.repeat(bits, LANES)) for row in registers]


def _always(p: Threads, i: Instruction) -> Found:
    """A test whether a barrier in shared memory, or registers of other warps, are ready: they always are."""
    return [(row, np.uint32(1)) for row in i.written]


def _bits(p: Threads, i: Instruction) -> Found:
    value = np.broadcast_to(p.value(i.sources[0]), p.threads).astype(np.uint64)
    if i.base in ("POPC", "UPOPC"):
        count = sum((value >> np.uint64(bit)) & np.uint64(1) for bit in range(32))
        return [(i.results[0].row, np.asarray(count).astype(np.uint32))]
    highest = np.where(value > 0, np.floor(np.log2(np.maximum(value, 1).astype(np.float64))), 2.0**32 - 1)
    return [(i.results[0].row, highest.astype(np.int64).astype(np.uint32))] if i.base in ("FLO", "UFLO") else None


MEANINGS: dict[str, Meaning] = {}
for _names, _meaning in {
    "MOV UMOV R2UR": _move,
    "HFMA2": _half_constants,
    "CS2R": _zeros,
    "S2R S2UR": _special,
    "LDC ULDC": _load_constant,
    "LDL": _load_local,
    "IADD3 UIADD3 VIADD": _add,
    "IMAD UIMAD": _multiply_add,
    "LEA ULEA": _shift_add,
    "LOP3 ULOP3": _logic,
    "PLOP3 UPLOP3": _predicate_logic,
    "ISETP UISETP FSETP": _compare,
    "SEL USEL FSEL": _select,
    "VIMNMX VIADDMNMX IMNMX": _least,
    "IABS": _absolute,
    "SHF USHF": _shift,
    "SGXT USGXT": _extend,
    "PRMT UPRMT": _permute,
    "P2R": _predicates_to_register,
    "R2P": _register_to_predicates,
    "I2F I2FP": _to_float,
    "FADD FMUL FFMA": _float_arithmetic,
    "MUFU": _reciprocal,
    "F2I": _to_integer,
    "SHFL": _shuffle,
    "ELECT": _elect,
    "VOTE VOTEU": _vote,
    "SYNCS USETMAXREG": _always,
    "LDS": _load_shared,
    "POPC UPOPC FLO UFLO": _bits,
}.items():
    MEANINGS |= dict.fromkeys(_names.split(), _meaning)
