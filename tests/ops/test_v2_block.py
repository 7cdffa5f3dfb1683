"""`ops.convnext_v2_block` and `ops.global_response_norm` against the formula, and their arguments."""

from __future__ import annotations

import pytest
import torch
from block_cases import activations, block_parameters, v2_parameters
from convnext_fast.kernels.weights import BlockWeights
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import WITHOUT_GRADIENT
from support import BOUNDS, relative_error

from convnext_fast import ops
from convnext_fast.backends import reference
from convnext_fast.backends.cpu import response_norm
from convnext_fast.config import ACTIVATIONS
from convnext_fast.ops import call
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


shapes = st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6), st.integers(3, 19))


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes,
    hidden=st.integers(1, 40),
    kernel=st.sampled_from([3, 5, 7]),
    dtype=st.sampled_from(list(BOUNDS)),
    act=st.sampled_from(ACTIVATIONS),
    recompute=st.sampled_from([0, 1, 2]),
    layout=st.sampled_from(["contiguous", "nchw", "strided"]),
    drop=st.booleans(),
    dwconv_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_block(shape, hidden, kernel, dtype, act, recompute, layout, drop, dwconv_bias, seed):
    """The output and every gradient, by formulas of our own, against autograd through the reference."""
    torch.manual_seed(seed)
    parameters = v2_parameters(shape[3], hidden, kernel, dtype, dwconv_bias)
    x = activations(shape, dtype, layout)
    scale = torch.randint(0, 2, (shape[0],)).to(dtype) / 0.7 if drop else None
    cotangent = torch.randn(shape, dtype=dtype)
    leaves = [t for t in (x, *parameters.values()) if t is not None]
    y = ops.convnext_v2_block(x, **parameters, drop_scale=scale, act=act, recompute=recompute)
    plain = reference.convnext_block(x, **parameters, gamma=None, drop_scale=scale, eps=1e-6, act=act)
    for result in (y, plain):
        assert result.dtype == dtype
    got, expected = (torch.autograd.grad(result, leaves, cotangent) for result in (y, plain))
    # With few channels LayerNorm's gradient is a difference of nearly equal terms.
    least = cotangent.norm().item()
    for i, (a, b) in enumerate(zip((y, *got), (plain, *expected), strict=True)):
        assert relative_error(a, b, least) <= BOUNDS[dtype], f"result {i}"


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_several_blocks_of_samples(recompute, dtype, monkeypatch):
    """Samples so large that one fills the cache, with more and with fewer pixels than channels; no drop path."""
    monkeypatch.setattr(response_norm, "_CACHE_BYTES", 1)
    torch.manual_seed(0)
    for side in (2, 5):
        parameters, x = v2_parameters(12, 20, 7, dtype), activations((3, side, side, 12), dtype, "contiguous")
        leaves, cotangent = [x, *parameters.values()], torch.randn(x.shape, dtype=dtype)
        y = ops.convnext_v2_block(x, **parameters, recompute=recompute)
        first, second = (torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for _ in range(2))
        plain = reference.convnext_block(x, **parameters, gamma=None, drop_scale=None, eps=1e-6, act="gelu")
        expected = [plain, *torch.autograd.grad(plain, leaves, cotangent)]
        assert max(relative_error(a, b) for a, b in zip((y, *first), expected, strict=True)) <= BOUNDS[dtype]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_dtype_of_a_result_does_not_depend_on_the_size():
    """float16 under autocast to bfloat16, in one block of rows and in several."""
    parameters = v2_parameters(12, 20, 7, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = [ops.convnext_v2_block(torch.randn(3, side, side, 12).half(), **parameters) for side in (2, 4, 80)]
    assert {y.dtype for y in results} == {torch.float16}


def test_gradients_with_a_layer_scale_too():
    """timm's blocks can have both."""
    torch.manual_seed(0)
    parameters = {**v2_parameters(6, 24, 7, torch.float64), "gamma": block_parameters(6, 1, 3, torch.float64)["gamma"]}
    x = activations((2, 5, 4, 6), torch.float64, "contiguous")
    leaves, cotangent = [x, *parameters.values()], torch.randn(x.shape, dtype=torch.float64)
    weights = BlockWeights(**parameters)
    y = call.run("block_fwd", "aten", x, weights, None, 1e-6, "gelu", 1, torch.float64)
    plain = reference.convnext_block(x, **parameters, drop_scale=None, eps=1e-6, act="gelu")
    got, expected = ([z, *torch.autograd.grad(z, leaves, cotangent)] for z in (y, plain))
    assert max(map(relative_error, got, expected)) <= BOUNDS[torch.float64]


def test_gradient_where_some_norms_are_zero():
    """ReLU of units whose bias is far below zero."""
    torch.manual_seed(0)
    parameters = v2_parameters(6, 24, 7, torch.float64)
    with torch.no_grad():
        parameters["b1"][::2] = -1e3
    x = activations((2, 5, 4, 6), torch.float64, "contiguous")
    leaves = [x, *parameters.values()]
    y = ops.convnext_v2_block(x, **parameters, act="relu")
    plain = reference.convnext_block(x, **parameters, gamma=None, drop_scale=None, eps=1e-6, act="relu")
    got, expected = (torch.autograd.grad(z.square().sum(), leaves) for z in (y, plain))
    assert max(map(relative_error, got, expected)) <= BOUNDS[torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["pure", "autocast", "autocast of half"])
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_half_precision_is_as_good_as_eager(dtype, mode, recompute):
    """Each result's error against float64 is at most twice that of eager PyTorch's in the same mode."""
    torch.manual_seed(3)
    stored = dtype if mode == "pure" else torch.float32
    parameters = v2_parameters(40, 160, 7, stored)
    x = activations((3, 11, 14, 40), dtype if mode == "autocast of half" else stored, "contiguous")
    scale, cotangent = torch.tensor([1.25, 0.0, 1.25]), torch.randn(x.shape).to(dtype)
    leaves = [x, *parameters.values()]

    def run(function, **options):
        with torch.autocast("cpu", dtype=dtype, enabled=mode != "pure"):
            y = function(x, **parameters, drop_scale=scale, act="gelu", **options)
        return [y, *torch.autograd.grad(y, leaves, cotangent.to(y))]

    fused = run(ops.convnext_v2_block, recompute=recompute)
    plain = {"gamma": None, "eps": 1e-6}
    eager, exact = (run(reference.convnext_block, **plain, dtype=d) for d in (None, torch.float64))
    for i, (a, e, r) in enumerate(zip(fused, eager, exact, strict=True)):
        assert a.dtype == e.dtype, f"result {i}"
        assert relative_error(a, r) <= 2 * relative_error(e, r), f"result {i}"


def test_opcheck():
    """Forward at every level, backward, and a frozen block, as operators of a compiled model."""
    torch.manual_seed(0)
    x, weights = activations((2, 5, 4, 8), torch.float32, "contiguous"), v2_parameters(8, 24, 7, torch.float32)
    block = BlockWeights(**weights, gamma=None)
    options = torch.tensor([0.0, 1.25]), 1e-6, "gelu"
    for recompute in (0, 1, 2):
        arguments = x, *block, *options, recompute, torch.float32
        torch.library.opcheck(torch.ops.convnext_fast.block_fwd, arguments)
        torch.library.opcheck(torch.ops.convnext_fast.block_fwd_cpu, arguments, test_utils=WITHOUT_GRADIENT)
        with torch.no_grad():
            y, *kept = torch.ops.convnext_fast.block_fwd(*arguments)
            plain = [t if t is None else t.detach() for t in block]
        kept = [t if t.numel() else None for t in kept]
        arguments = torch.randn_like(y), x.detach(), *kept, *plain, *options, torch.float32, True, True
        for name in ("block_bwd", "block_bwd_cpu"):
            operator = getattr(torch.ops.convnext_fast, name)
            torch.library.opcheck(operator, arguments, test_utils=WITHOUT_GRADIENT)
    frozen = freeze_block(*plain)
    operator = torch.ops.convnext_fast.frozen_block_fwd
    torch.library.opcheck(operator, (x.detach(), *frozen, 1e-6, "gelu", torch.float32), test_utils=WITHOUT_GRADIENT)


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
    with pytest.raises(ValueError, match=r"bias has shape \(5,\): expected \(6,\)"):
        ops.global_response_norm(h, weight, bias[:5])
