"""What the compiler makes of the MLP's and patchify's launches in 16 bits for GPUs that are not present."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import triton
from convnext_fast.kernels.mlp import fused, gemm, mlp_bwd, mlp_fwd
from convnext_fast.kernels.patchify.fwd import downsample_fwd, stem_fwd
from convnext_fast.kernels.statistics import stats_block
from convnext_fast.kernels.targets import planned_for

sys.path.append(str(Path(__file__).resolve().parents[4]))  # bench/ is not installed
from bench.static_analysis.compilation import compile_kernel, compile_launch, disassemble, recording, specialise

WHAT = ("forward 96", "forward 192", "forward 384", "backward 96", "backward 192", "backward 384", "patchify")
SHARED = {"sm_90": 227 * 1024, "sm_120": 99 * 1024, "gfx942": 64 * 1024}


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def mlp_launches(channels: int, backward: bool):
    P, K, f32 = 4096, 4 * channels, torch.float32
    stats = meta(-(-channels // stats_block(channels, torch.bfloat16)), P, 2, dtype=f32)
    folded = meta(K, channels), meta(2, K, dtype=f32), meta(channels, K)
    gamma = meta(channels, dtype=f32)
    with recording() as launches:
        if backward:
            mlp_bwd(meta(P, channels), meta(P, channels), stats, None, *folded, None, 1e-6, "gelu")
        else:
            mlp_fwd(meta(P, channels), stats, meta(P, channels), *folded, gamma, gamma, None, 1e-6, "gelu", False)
    return launches


def patch_launches():
    f32 = torch.float32
    vector = meta(96, dtype=f32)
    with recording() as launches:
        image, weight = meta(8, 3, 224, 224, dtype=f32), meta(96, 3, 4, 4, dtype=f32)
        stem_fwd(image, weight, vector, vector, vector, 1e-6, torch.bfloat16, torch.bfloat16)
        downsample_fwd(meta(8, 56, 56, 96), meta(192, 2, 2, 96), meta(192, dtype=f32), 1e-6, torch.bfloat16)
    return launches


# By default what test_budgets.py, which compiles all of inference, does not check by default.
@pytest.mark.parametrize(
    ("what", "target"),
    [
        pytest.param(*case, marks=() if case[0].startswith("backward") and case[1] == "sm_90" else pytest.mark.thorough)
        for case in itertools.product(WHAT, SHARED)
    ],
)
def test_resources(what, target):
    """No spills, shared memory within the chip's, 128-bit loads of activations, warp-group MMA on sm_90."""
    with planned_for(target):
        if what == "patchify":
            launches = patch_launches()
        else:
            direction, channels = what.split()
            launches = mlp_launches(int(channels), direction == "backward")
    assert launches
    for launch in launches:
        resources = compile_launch(launch, target)
        assert resources.spills == 0, resources
        assert resources.shared <= SHARED[target], resources
        code = disassemble(compile_kernel(launch, target))
        wide = ("dwordx4",) if target == "gfx942" else ("LDG.E.128", "LDGSTS.E.BYPASS.128")
        assert any(form in code for form in wide), launch.name
        if target == "sm_90":
            assert "HGMMA" in code, launch.name
            assert "HMMA." not in code, launch.name


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("channels", [96, 192, 384])
def test_candidates_of_the_autotuner_do_not_spill(channels, target, monkeypatch):
    module, name = (fused, "fused_configs") if channels <= 192 else (gemm, "gemm_configs")
    configs = getattr(module, name)
    for number in range(1, 4):
        monkeypatch.setattr(module, name, lambda *a, at=number: configs(*a)[: at + 1][-1:])
        with planned_for(target):
            launches = mlp_launches(channels, backward=False)
        for launch in launches:
            resources = compile_launch(launch, target)
            assert resources.spills == 0, resources
            assert resources.shared <= SHARED.get(target, 163 * 1024), resources


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=() if what in ("forward 384", "backward 96", "patchify") else pytest.mark.thorough)
        for what in WHAT
        if what != "forward 192"
    ],
)
def test_an_epsilon_in_float64_does_not_spread(what):
    """Inductor passes Python's numbers as float64, in which arithmetic took longer than the rest of a forward."""
    direction, _, channels = what.partition(" ")
    with planned_for("sm_90"):
        launches = mlp_launches(int(channels), direction == "backward") if channels else patch_launches()
    found = 0
    for launch in launches:
        if "eps" in launch.arguments:
            made = specialise(launch, "sm_90")
            made.signature["eps"] = "fp64"
            compiled = triton.compile(made.source(), target=made.gpu, options=made.options)
            found += 1
            for line in compiled.asm["ptx"].splitlines():
                assert "f64" not in line or line.strip().startswith((".param", "ld.param", "cvt.rn.f32.f64")), line
    assert found
