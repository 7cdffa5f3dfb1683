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


@pytest.mark.parametrize(
    ("dtype", "recompute", "widths"),
    [
        pytest.param(torch.bfloat16, 2, (40, 40), id="one width"),
        pytest.param(torch.bfloat16, 2, (16, 40), id="bfloat16-2", marks=pytest.mark.thorough),
        pytest.param(torch.bfloat16, 0, (16, 40), id="bfloat16-0", marks=pytest.mark.thorough),
        pytest.param(torch.float16, 1, (16, 40), id="float16-1", marks=pytest.mark.thorough),
    ],
)
def test_training_step(dtype, recompute, widths, through_kernels):
    """Stages of one width share their kernels, most of whose time is that of the compiler."""
    check_training_step(dtype, recompute, through_kernels, widths)


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
