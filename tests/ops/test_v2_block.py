"""`ops.convnext_v2_block` and `ops.global_response_norm` against the formula, and their arguments."""

from __future__ import annotations

import pytest
import torch
from block_cases import activations, v2_parameters
from support import BOUNDS, relative_error

from convnext_fast import ops
from convnext_fast.backends import reference
from convnext_fast.ops.folding import freeze_block


def written_out(h, weight, bias, eps=1e-6):
    """The global response norm as its paper writes it."""
    norms = h.square().sum((1, 2), keepdim=True).sqrt()
    return weight * h * norms / (norms.mean(-1, keepdim=True) + eps) + bias + h


def test_global_response_norm():
    torch.manual_seed(0)
    h, weight, bias = torch.randn(3, 5, 4, 7), torch.randn(7), torch.randn(7)
    expected = written_out(h.double(), weight.double(), bias.double(), 1e-3)
    assert relative_error(ops.global_response_norm(h, weight, bias, eps=1e-3), expected) <= BOUNDS[torch.float32]


def test_global_response_norm_sums_float16_in_float32():
    """Σh² of 64 pixels of 200 is 40 times the largest float16."""
    h, weight, bias = torch.full((1, 8, 8, 4), 200.0), torch.randn(4), torch.randn(4)
    y = ops.global_response_norm(h.half(), weight.half(), bias.half())
    assert relative_error(y, written_out(h, weight.half().float(), bias.half().float())) <= 1e-3


def test_gradient_where_every_unit_is_zero():
    h = torch.zeros(2, 3, 3, 5, dtype=torch.float64, requires_grad=True)
    y = ops.global_response_norm(h, *torch.randn(2, 5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(y.sum(), h)
    assert torch.equal(gradient, torch.ones_like(h))


@pytest.mark.parametrize("dtype", BOUNDS)
def test_frozen_block(dtype):
    torch.manual_seed(0)
    parameters = {name: p.detach() for name, p in v2_parameters(6, 24, 7, dtype).items()}
    x = activations((2, 5, 4, 6), dtype, "contiguous").detach()
    folded = freeze_block(**parameters, gamma=None)
    expected = reference.convnext_block(x, **parameters, gamma=None, drop_scale=None, eps=1e-6, act="gelu")
    assert relative_error(ops.frozen_block(x, *folded), expected) <= BOUNDS[dtype]
    assert relative_error(ops.frozen_block(x, *folded[:-1]), expected) > 0.01


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grn_weight": None}, TypeError, r"grn_weight is None: expected a tensor \(K,\)"),
        (
            {"grn_weight": torch.ones(1, 1, 1, 24)},
            ValueError,
            r"grn_weight has shape \(1, 1, 1, 24\): expected \(24,\)",
        ),
        ({"grn_bias": None}, TypeError, "grn_bias is a NoneType"),
        ({"grn_bias": torch.ones(6)}, ValueError, r"grn_bias has shape \(6,\): expected \(24,\)"),
        ({"recompute": 3}, ValueError, "recompute is 3"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"x": torch.randn(2, 5, 4, 6), **v2_parameters(6, 24, 7, torch.float32), **changes}
    with pytest.raises(error, match=message):
        ops.convnext_v2_block(**arguments)


def test_bad_arguments_of_the_norm_are_named():
    h, weight, bias = torch.randn(2, 5, 4, 6), torch.randn(6), torch.randn(6)
    with pytest.raises(ValueError, match=r"h has shape \(5, 4, 6\): expected 4 dimensions"):
        ops.global_response_norm(h[0], weight, bias)
    with pytest.raises(ValueError, match=r"grn_bias has shape \(5,\): expected \(6,\)"):
        ops.global_response_norm(h, weight, bias[:5])
