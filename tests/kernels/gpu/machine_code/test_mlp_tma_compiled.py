"""What the compiler makes of the wide MLP's forward with TMA loads, for GPUs that are not present."""

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
from convnext_fast.kernels.mlp import gemm_tma, mlp_fwd
from convnext_fast.kernels.mlp.tuning import tma_config
from convnext_fast.kernels.statistics import stats_block
from convnext_fast.kernels.targets import planned_for

sys.path.append(str(Path(__file__).resolve().parents[4]))  # bench/ is not installed
from bench.static_analysis.chips import CHIP_OF
from bench.static_analysis.compilation import compile_kernel, compile_launch, disassemble, recording

P = 50176
WIDTHS = (256, 384, 512, 768, 1024, 2048)  # of T, B and XL
DTYPES = (torch.bfloat16, torch.float16)
TARGETS = ("sm_90", "sm_100")
THOROUGH = {  # two widths on each target, in each dtype, as it is in inference and with everything
    (channels, target, DTYPES[(place + number) % 2], place == number)
    for place, channels in enumerate((512, 1024))
    for number, target in enumerate(TARGETS)
}


def launches(channels, target, dtype, full):
    """Launches of ``mlp_fwd``; ``full``: with what takes registers: a saved a, drop path and a float32 residual."""

    def meta(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    f32, K = torch.float32, 4 * channels
    stats = meta(-(-channels // stats_block(channels, dtype)), P, 2, dtype=f32)
    vector, scale = meta(channels, dtype=f32), meta(256, dtype=f32) if full else None
    residual = meta(P, channels, dtype=f32 if full else dtype)
    folded = meta(K, channels), meta(2, K, dtype=f32), meta(channels, K)
    with planned_for(target), recording() as made:
        mlp_fwd(
            meta(P, channels), stats, residual, *folded, vector, vector if full else None, scale, 1e-6, "gelu", full
        )
    return made


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id="-".join(map(str, case)),
            marks=()
            if case == (384, "sm_90", torch.bfloat16, False)
            else pytest.mark.thorough
            if case in THOROUGH
            else pytest.mark.exhaustive,
        )
        for case in itertools.product(WIDTHS, TARGETS, DTYPES, (False, True))
    ],
)
def test_resources(case, monkeypatch):
    """TMA and the products of warp groups, in groups of warps with registers of their own; no spills."""
    target = case[1]
    if tma_config(target, True, False) is None:
        pytest.skip(f"this Triton makes no such kernel for {target}")
    monkeypatch.setattr(gemm_tma, "ENABLED", True)
    made = launches(*case)
    assert [launch.name for launch in made] == ["_fc1_tma_kernel", "_fc2_tma_kernel"]
    for launch in made:
        found = compile_launch(launch, target)
        assert found.spills == 0, found
        assert found.shared <= CHIP_OF[target].shared_block, found
        code = disassemble(compile_kernel(launch, target))
        assert "UTMALDG" in code
        assert "USETMAXREG" in code
        assert re.search(r"HGMMA|UTCHMMA", code)
