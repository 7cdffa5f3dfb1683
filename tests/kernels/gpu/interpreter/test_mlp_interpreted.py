import pytest
import torch
from convnext_fast.kernels.autotuning import SHARES
from convnext_fast.kernels.mlp import fused, fused_bwd, gemm, gemm_bwd, mlp_bwd, tuning
from convnext_fast.kernels.mlp.fused import fused_mlp_fwd
from convnext_fast.kernels.mlp.fused_bwd import fused_mlp_bwd
from convnext_fast.kernels.mlp.gemm import gemm_mlp_fwd
from convnext_fast.kernels.mlp.gemm_bwd import gemm_mlp_bwd
from convnext_fast.kernels.targets import planned_for
from mlp_cases import (
    AWKWARD,
    EMPTY,
    FAR,
    OTHER_ACTS,
    OTHER_ACTS_BACKWARD,
    Case,
    check_backward,
    check_forward,
    check_result_in_two_dtypes,
    check_small_layer_scale,
)


@pytest.mark.parametrize("forward", [fused_mlp_fwd, gemm_mlp_fwd])
@pytest.mark.parametrize("case", [*AWKWARD, *EMPTY, *OTHER_ACTS, *FAR], ids=str)
def test_forward(case, forward):
    check_forward(case, forward)


@pytest.mark.parametrize("number", range(1, 4))
def test_every_candidate_of_the_autotuner(number, monkeypatch):
    fused_configs, gemm_configs = tuning.fused_configs, tuning.gemm_configs
    monkeypatch.setattr(fused, "fused_configs", lambda *a: fused_configs(*a)[: number + 1][-1:])
    monkeypatch.setattr(gemm, "gemm_configs", lambda *a: gemm_configs(*a)[: number + 1][-1:])
    case = Case(1, 70, 80, 96, torch.float16)
    check_forward(case, fused_mlp_fwd)
    check_forward(case, gemm_mlp_fwd)


@pytest.mark.parametrize("config", [*tuning._SMALL, *tuning._LARGE], ids=str)
def test_tiles_of_few_and_of_many_rows(config, monkeypatch):
    monkeypatch.setattr(gemm, "gemm_configs", lambda *a: (config,))
    check_forward(Case(3, 100, 75, 300, torch.float16), gemm_mlp_fwd)


@pytest.mark.parametrize("share", SHARES[1:], ids=str)
@pytest.mark.parametrize(("module", "backward"), [(fused_bwd, fused_mlp_bwd), (gemm_bwd, gemm_mlp_bwd)])
def test_every_share_of_the_autotuner(share, module, backward, monkeypatch):
    monkeypatch.setattr(module, "SHARES", (share,))
    check_backward(Case(3, 70, 40, 48, torch.float16), backward)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_parts_of_other_targets(target):
    """C = 40 is 32 + 16 channels for warp groups and 3·16 elsewhere."""
    case = Case(2, 25, 40, 72, torch.float16)
    with planned_for(target):
        check_forward(case, fused_mlp_fwd)
        check_backward(case, fused_mlp_bwd)


@pytest.mark.parametrize("save_hidden", [False, True])
def test_sums_that_two_programs_share(save_hidden):
    """Warp groups beyond 128 channels; 160 are 64 + 64 + 32."""
    with planned_for("sm_90"):
        check_backward(Case(2, 25, 160, 136, torch.float16), mlp_bwd, save_hidden)


@pytest.mark.parametrize("forward", [fused_mlp_fwd, gemm_mlp_fwd])
def test_float32_residual_beside_float16(forward):
    check_forward(Case(2, 20, 24, 96, torch.float16, residual_dtype=torch.float32), forward)


@pytest.mark.parametrize("forward", [fused_mlp_fwd, gemm_mlp_fwd])
@pytest.mark.parametrize("grn", [False, True])
def test_result_in_two_dtypes(grn, forward):
    check_result_in_two_dtypes(Case(3, 25, 75, 96, torch.float16, grn=grn), forward)


@pytest.mark.parametrize("backward", [fused_mlp_bwd, gemm_mlp_bwd])
@pytest.mark.parametrize("case", [*AWKWARD, *OTHER_ACTS_BACKWARD], ids=str)
def test_backward(case, backward):
    check_backward(case, backward)


@pytest.mark.parametrize("backward", [fused_mlp_bwd, gemm_mlp_bwd])
def test_backward_from_saved_activations(backward):
    check_backward(Case(2, 25, 24, 72, torch.float16, residual_dtype=torch.float32), backward, save_hidden=True)


@pytest.mark.parametrize("case", FAR, ids=str)
def test_backward_of_float32_far_from_zero(case):
    for save_hidden in (False, True):
        check_backward(case, mlp_bwd, save_hidden)


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_backward_of_an_empty_batch(case):
    check_backward(case, mlp_bwd)


@pytest.mark.parametrize("backward", [fused_mlp_bwd, gemm_mlp_bwd])
@pytest.mark.parametrize(
    ("layer_scale", "loss_scale"), [(1e-6, 2.0**13), (1e-3, 2.0**4), (1.0, 1.0), (300.0, 2.0**-8), (0.0, 1.0)]
)
def test_layer_scales_of_float16(backward, layer_scale, loss_scale):
    """γ·w2 alone would vanish in float16 at the start of training, and be infinite with a large γ."""
    case = Case(3, 25, 40, 72, torch.float16, residual_dtype=torch.float32)
    check_small_layer_scale(case, layer_scale, loss_scale, backward)
