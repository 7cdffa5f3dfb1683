"""The MLP with a global response norm: machine code for sm_80, executed."""

import dataclasses

import pytest
import torch
from convnext_fast.kernels.mlp import fused_bwd, grn, mlp_bwd
from convnext_fast.kernels.mlp.fused import fused_mlp_fwd
from convnext_fast.kernels.mlp.fused_bwd import fused_mlp_bwd
from convnext_fast.kernels.mlp.gemm import gemm_mlp_fwd
from convnext_fast.kernels.mlp.gemm_bwd import gemm_mlp_bwd
from mlp_cases import Case, check_backward, check_forward

BF16, FP16 = torch.bfloat16, torch.float16
FUSED, GEMM = (fused_mlp_fwd, fused_mlp_bwd), (gemm_mlp_fwd, gemm_mlp_bwd)
CASES = [
    pytest.param(*FUSED, Case(2, 49, 24, 96, BF16, grn=True), id="fused-bfloat16"),
    pytest.param(*GEMM, Case(2, 70, 24, 96, FP16, grn=True), id="gemm-float16", marks=pytest.mark.thorough),
    pytest.param(
        *FUSED, Case(3, 49, 40, 160, FP16, full=False, grn=True), id="fused-float16", marks=pytest.mark.thorough
    ),
    pytest.param(*GEMM, Case(3, 49, 96, 384, BF16, grn=True), id="gemm-bfloat16", marks=pytest.mark.thorough),
    pytest.param(*GEMM, Case(2, 50, 37, 77, torch.float32, grn=True), id="gemm-float32", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("forward", "backward", "case"), CASES)
def test_forward_and_backward(emulating, forward, backward, case):
    with emulating(arch=80, detect_races="rw"):
        check_forward(case, forward)
        check_backward(case, backward, again=case.dtype == BF16)


@pytest.mark.thorough
@pytest.mark.parametrize("apart", [False, True])
def test_sums_of_many_tiles_and_saved_activations(emulating, monkeypatch, apart):
    """Three tiles per sample, which a separate launch adds up; D and E by one program, and by two."""
    monkeypatch.setattr(grn, "MOST_TILES", 2)
    monkeypatch.setattr(fused_bwd, "weights_apart", lambda channels: apart)
    case = Case(2, 300, 24, 96, BF16, residual_dtype=torch.float32, grn=True)
    with emulating(arch=80, detect_races="rw"):
        check_forward(case)
        check_backward(dataclasses.replace(case, pixels=70), mlp_bwd, save_hidden=True)
