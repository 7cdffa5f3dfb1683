"""The wide MLP's forward with TMA loads: values in the interpreter, with two programs of several tiles each."""

import pytest
import torch
from convnext_fast.kernels.mlp import gemm_tma, mlp_fwd, tuning
from convnext_fast.kernels.mlp.gemm_tma import tma_mlp_fwd
from convnext_fast.kernels.mlp.grn import Grn
from convnext_fast.kernels.targets import planned_for
from mlp_cases import (
    Case,
    assert_each_as_good_as_eager,
    check_forward,
    check_result_in_two_dtypes,
    eager_reference,
    inputs,
    mlp_reference,
)
from mlp_cases import run_forward as run

CASE = Case(3, 50, 40, 160, torch.float16)
NEUTRAL = {"residual": torch.zeros, "drop_scale": torch.ones, "gamma": torch.ones, "b2": torch.zeros}


pytestmark = pytest.mark.skipif(tuning._TRITON < (3, 9), reason="needs Triton 3.9 for sm_100")


@pytest.fixture(autouse=True)
def _on_two_processors(monkeypatch):
    monkeypatch.setattr(gemm_tma, "PROCESSORS", {"sm_90": 2, "sm_100": 2})


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize(
    "case",
    [
        CASE,
        Case(3, 50, 40, 160, torch.float16, full=False),
        Case(1, 128, 256, 264, torch.float16),
        Case(5, 67, 264, 520, torch.float16, residual_dtype=torch.float32),
        Case(1, 1, 8, 8, torch.float16, draws=8),
        Case(2, 20, 24, 96, torch.float16, act="silu"),
        Case(0, 49, 40, 160, torch.float16),
    ],
    ids=str,
)
def test_forward(case, target):
    with planned_for(target):
        check_forward(case, tma_mlp_fwd)


def test_result_in_two_dtypes():
    with planned_for("sm_90"):
        check_result_in_two_dtypes(CASE, tma_mlp_fwd)


@pytest.mark.parametrize("absent", NEUTRAL)
def test_without_an_operand(absent):
    """The same as with zeros or ones instead of it."""
    given = inputs(CASE)
    neutral = given | {absent: NEUTRAL[absent](given[absent].shape, dtype=given[absent].dtype)}
    with planned_for("sm_90"):
        y, a, *_ = run(CASE, given | {absent: None}, tma_mlp_fwd)
    assert a is None
    assert_each_as_good_as_eager(
        [({"y": y}, eager_reference(CASE, neutral), mlp_reference(CASE, neutral, torch.float64))]
    )


def test_choice(monkeypatch):
    """TMA is used only on request, on two targets, in 16 bits, for rows and addresses that are multiples of 16 bytes,
    and with tiles for all processors.
    """
    u, w1, w2 = (torch.empty(shape, dtype=torch.float16) for shape in ((9, 256), (264, 256), (256, 264)))
    with planned_for("sm_90"):
        assert not gemm_tma.serves(u, None, w1, w2, None)
    monkeypatch.setattr(gemm_tma, "ENABLED", True)
    for target, expected in {"sm_90": True, "sm_100": True, "sm_80": False, "sm_120": False, "gfx942": False}.items():
        with planned_for(target):
            assert gemm_tma.serves(u, None, w1, w2, None) == expected
    with planned_for("sm_90"):
        assert not gemm_tma.serves(u[:, :128].contiguous(), None, w1[:, :128].contiguous(), w2[:128], None)
        assert not gemm_tma.serves(u.float(), None, w1.float(), w2.float(), None)
        assert not gemm_tma.serves(u, None, w1, w2, Grn(torch.empty(264), None, 1))
        assert not gemm_tma.serves(u, None, torch.empty(260, 256, dtype=u.dtype), w2, None)
        assert not gemm_tma.serves(torch.empty(9 * 256 + 1, dtype=u.dtype)[1:].view(9, 256), None, w1, w2, None)


def test_the_mlp_takes_it(monkeypatch):
    monkeypatch.setattr(gemm_tma, "ENABLED", True)
    launched = []
    launch = gemm_tma.launch
    monkeypatch.setattr(gemm_tma, "launch", lambda kernel, *a, **k: launched.append(kernel) or launch(kernel, *a, **k))
    with planned_for("sm_90"):
        check_forward(Case(2, 20, 200, 208, torch.float16), mlp_fwd)
        check_forward(Case(2, 20, 204, 208, torch.float16), mlp_fwd)
    assert launched == [gemm_tma._fc1_tma_kernel, gemm_tma._fc2_tma_kernel]
