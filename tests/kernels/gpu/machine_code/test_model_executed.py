"""A whole model's training step and the demo's digits through the machine code of every kernel."""

import pytest
import torch
from model_cases import check_digits, check_training_step

from convnext_fast.backends import environment


@pytest.fixture
def through_kernels(emulating, monkeypatch):
    """Runs a function with the fused ops on the kernels' sm_80 code, checked for races between blocks."""
    monkeypatch.setattr(environment, "REQUEST", "triton")

    def run(function):
        with emulating(arch=80, detect_races="rw", detailed=False) as emulation:
            result = function()
        assert len(emulation.launches) >= 10
        return result

    return run


@pytest.mark.thorough
@pytest.mark.parametrize(("dtype", "recompute"), [(torch.bfloat16, 2), (torch.bfloat16, 0), (torch.float16, 1)])
def test_training_step(dtype, recompute, through_kernels):
    check_training_step(dtype, recompute, through_kernels)


@pytest.mark.thorough
@pytest.mark.parametrize("recompute", [0, 1])
def test_training_step_in_float32(precision, recompute, through_kernels):
    """With TF32, which rounds operands to 11 bits, and without."""
    error = check_training_step(torch.float32, recompute, through_kernels)
    assert (error > 2**-14) == (precision == "tf32")


@pytest.mark.parametrize(
    ("count", "dtype"), [(16, torch.bfloat16), pytest.param(200, torch.float32, marks=pytest.mark.thorough)]
)
def test_digits(count, dtype, through_kernels):
    check_digits(count, dtype, through_kernels)
