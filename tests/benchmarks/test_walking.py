"""The walk through machine code: what integers become, which way branches go, what memory is touched."""

import numpy as np
import pytest

from bench.static_analysis import program_costs, walking
from bench.static_analysis.sass import decode
from bench.static_analysis.walking import Program, UnknownFlow


def listing(*lines):
    return "\n".join(f"        /*{16 * place:04x}*/                   {line} ;" for place, line in enumerate(lines))


def walk(*lines, threads=32, place=(0, 0, 0), constants=()):
    seen = []
    program = Program(decode(listing(*lines, "EXIT")), threads, place, dict(constants), lambda i, w, m: seen.append(i))
    program.walk()
    return program, [each.opcode for each in seen]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("IADD3 R3, R1, R2, 0x5", 7 - 3 + 5),
        ("IADD3 R3, R1, -R2, RZ", 10),
        ("IMAD R3, R1, 0x6, R2", 39),
        ("IMAD.HI.U32 R3, R2, 0x2, RZ", 1),
        ("LEA R3, R1, R1, 0x2", 35),
        ("LEA.HI.SX32 R3, R2, R1, 0x1f", 5),
        ("LOP3.LUT R3, R1, 0xc, RZ, 0xc0, !PT", 4),
        ("LOP3.LUT R3, R1, 0x8, RZ, 0xfc, !PT", 15),
        ("SHF.R.S32.HI R3, RZ, 0x1f, R2", -1),
        ("SHF.L.U32 R3, R1, 0x3, RZ", 56),
        ("SHF.R.U32.HI R3, RZ, 0x1, R1", 3),
        ("SGXT R3, R1, 0x3", -1),
        ("SGXT.U32 R3, R2, 0x4", 13),
        ("PRMT R3, R1, 0x5410, R2", 0xFFFD0007 - (1 << 32)),
        ("VIADDMNMX R3, R1, R2, 0x5, PT", 4),
        ("VIMNMX R3, R1, R2, !PT", 7),
        ("IABS R3, R2", 3),
        ("SEL R3, R1, R2, !PT", -3),
        ("HFMA2.MMA R3, -RZ, RZ, 1.875, 0", 0x3F800000),
        ("LDC R3, c[0x0][0x210]", 42),
        ("S2R R3, SR_CTAID.Y", 9),
    ],
)
def test_integers(line, expected):
    program, _ = walk("MOV R1, 0x7", "MOV R2, -0x3", line, place=(0, 9, 0), constants={0x210: 42})
    assert program.known[3]
    assert np.array_equal(program.table[3].view(np.int32), np.full(32, expected, np.int32))


def test_64_bits_carry():
    program, _ = walk(
        "MOV R2, -0x1", "MOV R3, 0x1", "IADD3 R4, P0, R2, 0x1, RZ", "IADD3.X R5, R3, RZ, RZ, P0, !PT",
        "IMAD.WIDE.U32 R6, R2, 0x2, R2", "LEA R8, P1, R2, R2, 0x1", "LEA.HI.X R9, R2, R3, R3, 0x1, P1",
    )  # fmt: skip
    value = {row: int(program.table[row][0]) | int(program.table[row + 1][0]) << 32 for row in (4, 6, 8)}
    whole = (1 << 32) + 0xFFFFFFFF
    assert value == {4: whole + 1, 6: 2 * 0xFFFFFFFF + whole, 8: 2 * whole + whole}


def test_a_division_by_a_number_that_is_not_constant():
    lines = (
        "I2F.U32.RP R5, R2", "MUFU.RCP R5, R5", "VIADD R6, R5, 0xffffffe", "F2I.FTZ.U32.TRUNC.NTZ R7, R6",
        "MOV R6, RZ", "IMAD.MOV R8, RZ, RZ, -R7", "IMAD R9, R8, R2, RZ", "IMAD.HI.U32 R7, R7, R9, R6",
        "IMAD.HI.U32 R3, R7, R1, RZ", "IMAD.MOV R8, RZ, RZ, -R3", "IMAD R9, R2, R8, R1",
        "ISETP.GE.U32.AND P0, PT, R9, R2, PT", "@P0 IMAD.IADD R9, R9, 0x1, -R2", "@P0 VIADD R3, R3, 0x1",
        "ISETP.GE.U32.AND P0, PT, R9, R2, PT", "@P0 VIADD R3, R3, 0x1",
    )  # fmt: skip
    for number, by in ((1000, 7), (123456, 24), (5, 9)):
        program, _ = walk(f"MOV R1, {number:#x}", f"MOV R2, {by:#x}", *lines)
        assert program.table[3][0] == number // by


def test_loops_and_threads_that_part():
    _, seen = walk("MOV R1, RZ", "VIADD R1, R1, 0x1", "ISETP.LT.AND P0, PT, R1, 0x5, PT", "@P0 BRA 0x10")
    assert seen.count("VIADD") == 5
    program, seen = walk(
        "S2R R1, SR_TID.X", "ISETP.LT.AND P0, PT, R1, 0x20, PT", "@P0 BRA 0x50", "MOV R2, 0x1", "BRA 0x60",
        "MOV R2, 0x2", "BAR.SYNC.DEFER_BLOCKING 0x0", "MOV R3, 0x3", threads=64,
    )  # fmt: skip
    assert program.table[2].tolist() == [2] * 32 + [1] * 32
    assert seen.count("MOV") == 3
    assert (program.table[3] == 3).all()


def test_warps_of_other_tasks_do_what_they_are_told():
    """One warp stores a byte for the other, which waits at the same barrier elsewhere and branches by what it reads."""
    lines = (
        "S2R R1, SR_TID.X", "MOV R2, 0x400", "ISETP.GE.AND P0, PT, R1, 0x20, PT", "@P0 BRA 0x80",
        "MOV R3, 0x10002", "STS [R2+0x8], R3", "BAR.SYNC.DEFER_BLOCKING 0x1", "EXIT", "BAR.SYNC.DEFER_BLOCKING 0x1",
        "LDS.U8 R4, [R2+{0}]", "ISETP.NE.AND P1, PT, R4, RZ, PT", "@P1 EXIT", "MOV R5, 0x7",
    )  # fmt: skip
    for offset, byte in ((8, 2), (9, 0), (10, 1)):
        program, seen = walk(*(line.format(hex(offset)) for line in lines), threads=64)
        assert (program.table[4][32:] == byte).all()
        assert (program.table[5][32:] == 7).all() == (byte == 0)
    with pytest.raises(UnknownFlow, match="EXIT"):
        walk(*(line.format("0xc") for line in lines), threads=64)
    replaced = ("LDG.E R6, desc[UR4][R2.64]", "STS [R2+0x8], R6")
    with pytest.raises(UnknownFlow, match="EXIT"):
        walk(*(line.format("0x8").replace("0x80", "0xa0") for line in (*lines[:6], *replaced, *lines[6:])), threads=64)
    _, seen = walk("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8", "PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0", "@!P0 BRA 0x0")
    assert seen.count("BRA") == 1


def test_what_a_tensor_holds_decides_nothing():
    with pytest.raises(UnknownFlow, match=r"BRA at 0x20 depends on P0"):
        walk("LDG.E R1, desc[UR4][R2.64]", "ISETP.LT.AND P0, PT, R1, 0x5, PT", "@P0 BRA 0x0")
    program, _ = walk("STL [R1+0x8], R2", "LDL R4, [R1+0x8]", "FADD R5, R5, R6", "LDG.E.64 R6, desc[UR4][R2.64]")
    assert program.known[4]
    assert not program.known[6]
    assert not program.known[7]


def test_a_kept_predicate_is_known_beside_one_that_is_not():
    program, _ = walk(
        "LDG.E R1, desc[UR4][R2.64]", "ISETP.LT.AND P0, PT, R1, 0x5, PT", "ISETP.LT.AND P3, PT, RZ, 0x5, PT",
        "P2R R4, PR, RZ, 0x8", "ISETP.GE.AND P3, PT, RZ, 0x5, PT", "ISETP.NE.AND P3, PT, R4, RZ, PT", "@!P3 EXIT",
        "MOV R5, 0x7",
    )  # fmt: skip
    assert (program.table[5] == 7).all()


def costs_of(*lines, threads=32):
    watcher = program_costs._Watcher(threads // 32, 1 << 16)
    program = Program(decode(listing(*lines, "EXIT")), threads, (0, 0, 0), {}, watcher.see)
    watcher.program = program
    program.walk()
    return watcher.costs()


@pytest.mark.parametrize(("stride", "sectors", "wavefronts"), [(4, 4, 1), (8, 8, 2), (128, 32, 32), (0, 1, 1)])
def test_sectors_and_banks(stride, sectors, wavefronts):
    found = costs_of(
        "S2R R2, SR_TID.X", f"IMAD R2, R2, {stride:#x}, RZ", "MOV R3, RZ", "LDG.E R4, desc[UR4][R2.64]",
        "LDG.E R4, desc[UR4][R2.64]", "STG.E desc[UR4][R2.64], R4", "LDS R5, [R2]",
    )  # fmt: skip
    assert found.read == 32 * sectors  # the second load finds them in the L1 cache
    assert found.written == 32 * sectors
    assert found.shared == wavefronts


def test_a_copy_past_the_cache_counts_each_time_and_a_guard_leaves_threads_out():
    copy = "LDGSTS.E.BYPASS.128 [R6], desc[UR4][R2.64], P0"
    lines = ("S2R R2, SR_TID.X", "ISETP.LT.AND P0, PT, R2, 0x8, PT", "IMAD R6, R2, 0x10, RZ", "IMAD R2, R2, 0x10, RZ")
    assert costs_of(*lines, "MOV R3, RZ", copy, copy).read == 2 * 8 * 16
    assert costs_of(*lines, "MOV R3, RZ", copy.replace("P0", "!PT")).read == 0


def test_bytes_that_a_barrier_awaits_are_read():
    """By TMA, for one thread tells the barrier; other arrivals bring no bytes."""
    found = costs_of(
        "S2R R1, SR_TID.X", "ISETP.NE.AND P0, PT, R1, RZ, PT", "MOV R3, 0x2000",
        "@!P0 SYNCS.ARRIVE.TRANS64 RZ, [UR6+0x80], R3", "@!P0 SYNCS.ARRIVE.TRANS64.ART0 RZ, [UR6+0x88], R3",
        "@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR6+0x88], RZ", threads=64,
    )  # fmt: skip
    assert (found.read, found.shared) == (0x2000, 0x2000 // 128)


def test_products_and_the_chain():
    group = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"
    found = costs_of(group, group + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", threads=128)
    assert found.flops == 2 * 2 * 64 * 128 * 16
    assert found.tensor == 2 * 64
    assert found.chain >= 2 * 64 + program_costs.PRODUCT_LATENCY
    assert costs_of("HMMA.16816.F32.BF16 R8, R12, R16, R8").flops == 2 * 16 * 8 * 16
    alone = costs_of("LDG.E R4, desc[UR4][R2.64]", "FADD R4, R4, R4").chain
    assert alone > program_costs.LATENCY["LDG"]
    assert costs_of("LDG.E R4, desc[UR4][R2.64]", "FADD R5, R6, R6").chain < 20


def test_too_long_a_walk_is_refused():
    program = Program(decode(listing("BRA 0x0", "EXIT")), 32, (0, 0, 0), {}, lambda *_: None)
    with pytest.raises(ValueError, match="more instructions than are walked"):
        program.walk(most=100)
    with pytest.raises(ValueError, match="expected the listing of one function"):
        decode("nothing")
    assert issubclass(walking.UnknownFlow, ValueError)
