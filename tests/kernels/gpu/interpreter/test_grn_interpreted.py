"""The MLP with a global response norm, against float64 in Triton's interpreter."""

import dataclasses
import functools

import pytest
import torch
from block_cases import v2_parameters
from convnext_fast.kernels.mlp import grn, mlp_bwd
from convnext_fast.kernels.mlp.fused import fused_mlp_fwd
from convnext_fast.kernels.mlp.fused_bwd import fused_mlp_bwd
from convnext_fast.kernels.mlp.gemm import gemm_mlp_fwd
from convnext_fast.kernels.mlp.gemm_bwd import gemm_mlp_bwd
from convnext_fast.kernels.targets import planned_for
from kernel_support import assert_as_good_as_eager
from mlp_cases import (
    EMPTY,
    GRN,
    Case,
    assert_each_as_good_as_eager,
    check_backward,
    check_forward,
    eager_reference,
    gradients,
    inputs,
    mlp_reference,
    run_forward,
)

from convnext_fast import ops
from convnext_fast.backends import reference
from convnext_fast.ops.folding import freeze_block

FORMS = [(fused_mlp_fwd, fused_mlp_bwd), (gemm_mlp_fwd, gemm_mlp_bwd)]
IDS = ["fused", "gemm"]
SMALL = Case(3, 50, 24, 96, torch.float16, grn=True)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("case", GRN, ids=str)
def test_forward_and_backward(case, form):
    forward, backward = form
    check_forward(case, forward)
    check_backward(case, backward)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_sums_of_many_tiles_are_added_before(form, monkeypatch):
    """130 pixels are 2 or 3 tiles."""
    monkeypatch.setattr(grn, "MOST_TILES", 1)
    test_forward_and_backward(GRN[-1], form)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_backward_from_saved_activations(form):
    check_backward(dataclasses.replace(SMALL, residual_dtype=torch.float32), form[1], save_hidden=True)


def test_sums_that_two_programs_share():
    with planned_for("sm_90"):
        check_backward(Case(2, 25, 160, 136, torch.float16, grn=True), mlp_bwd)


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_an_empty_batch(case):
    case = dataclasses.replace(case, grn=True)
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_samples_do_not_mix(form):
    """Infinite pixels of one sample change no bit of another's results."""
    forward, backward = form
    given = inputs(SMALL) | {"drop_scale": None}
    apart = given | {"u": given["u"].clone()}
    apart["u"].view(3, 50, 24)[1] = float("inf")

    def results(given):
        y, *_ = run_forward(SMALL, given, forward)
        return y.view(3, 50, 24), gradients(SMALL, given, backward, save_hidden=False)["du"].view(3, 50, 24)

    for want, got in zip(results(given), results(apart), strict=True):
        assert torch.equal(want[::2], got[::2])
        assert not torch.equal(want[1], got[1])


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_a_unit_that_is_zero_everywhere(form):
    """Its norm is 0, and the backward divides by it."""
    case = dataclasses.replace(SMALL, act="relu", dtype=torch.float32)
    given = inputs(case)
    given["b1"][::3] = -100.0
    check_given(case, given, *form)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_squares_beyond_the_range_of_float16(form):
    """50 pixels of about 300 have squares that add up to 4.5 million, where float16 ends at 65,504."""
    given = inputs(SMALL)
    given["b1"] += 300.0
    given["w2"] /= 300.0
    check_given(SMALL, given, *form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_block_at_each_level_of_recomputation(dtype):
    """Output and every gradient of the public op; frozen, its output."""
    torch.manual_seed(0)
    parameters = {name: p.detach() for name, p in v2_parameters(8, 32, 3, dtype).items()}
    x, dy = torch.randn(2, 3, 5, 7, 8).to(dtype)
    drop_scale = torch.tensor([0.0, 1.25, 1.25], dtype=dtype)

    def results(kind, function, **options):
        leaves = {name: t.to(kind).requires_grad_() for name, t in {"x": x, **parameters}.items()}
        y = function(**leaves, drop_scale=drop_scale.to(kind), **options)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy.to(kind))]

    plain = functools.partial(reference.convnext_block, gamma=None, eps=1e-6, act="gelu")
    eager, exact = results(dtype, plain), results(torch.float64, plain)
    made = [results(dtype, ops.convnext_v2_block, recompute=level) for level in range(3)]
    assert all(map(torch.equal, made[1], made[2]))
    for level in (0, 1):
        for name, *three in zip(("y", "x", *parameters), made[level], eager, exact, strict=True):
            assert_as_good_as_eager(*three, name, terms=3 * 5 * 7)
    frozen = ops.frozen_block(x, *freeze_block(**parameters, gamma=None))
    eager, exact = (
        plain(**{name: t.to(kind) for name, t in {"x": x, **parameters}.items()}, drop_scale=None)
        for kind in (dtype, torch.float64)
    )
    assert_as_good_as_eager(frozen, eager, exact)


def check_given(case, given, forward, backward):
    y, *_ = run_forward(case, given, forward)
    ours = {"y": y} | gradients(case, given, backward, save_hidden=False)
    results = [(ours, eager_reference(case, given), mlp_reference(case, given, torch.float64))]
    assert_each_as_good_as_eager(results, terms=case.samples * case.pixels)
