import pytest
import torch
from convnext_fast.kernels.pointwise_mlp import fused_fwd, gemm_fwd
from mlp_cases import AWKWARD, EMPTY, OTHER_ACTS, Case, check_forward


@pytest.mark.parametrize("forward", [fused_fwd, gemm_fwd])
@pytest.mark.parametrize("case", [*AWKWARD, *EMPTY, *OTHER_ACTS], ids=str)
def test_forward(case, forward):
    check_forward(case, forward)


@pytest.mark.parametrize("forward", [fused_fwd, gemm_fwd])
def test_float32_residual_beside_float16(forward):
    check_forward(Case(2, 20, 24, 96, torch.float16, residual_dtype=torch.float32), forward)
