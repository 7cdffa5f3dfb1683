"""A whole model's training step and the demo's digits through every kernel in Triton's interpreter."""

import pytest
import torch
from model_cases import check_digits, check_training_step

from convnext_fast.backends import environment


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(environment, "REQUEST", "triton")


@pytest.mark.parametrize(("dtype", "recompute"), [(torch.float32, 0), (torch.float32, 2), (torch.float16, 1)])
def test_training_step(dtype, recompute):
    check_training_step(dtype, recompute, lambda run: run())


def test_digits():
    check_digits(8, torch.float32, lambda run: run())
