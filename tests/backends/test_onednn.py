"""The calls of ATen and oneDNN behind the CPU path: values, shapes, non-finite inputs."""

import functools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from block_cases import block_parameters
from frozen_support import frozen_weights, plain_block
from hypothesis import given, settings
from hypothesis import strategies as st
from support import draws_for, no_worse_together, relative_error

from convnext_fast import ops
from convnext_fast.backends.cpu import aten_layers, llvm, mlp, onednn
from convnext_fast.backends.cpu import ops as cpu

ACTIVATIONS = {None: lambda t: t, "gelu": F.gelu, "gelu_new": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu}
needs_onednn = pytest.mark.skipif(not onednn.supports(torch.empty(1)), reason="PyTorch here has no oneDNN on x86")


@needs_onednn
@pytest.mark.parametrize("act", ACTIVATIONS)
@given(rows=st.integers(1, 40), channels=st.integers(1, 40), hidden=st.integers(1, 70), layout=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_linear(act, rows, channels, hidden, layout):
    found, added, sizes = [], [], []
    for _ in draws_for(rows * hidden, 512):  # eager is more accurate in GELU's tail
        x, residual = torch.randn(rows, channels), torch.randn(rows, hidden)
        weight = torch.randn(channels, hidden).t() if layout & 1 else torch.randn(hidden, channels)
        bias = torch.randn(hidden) if layout & 2 else None
        wide = [None if t is None else t.double() for t in (x, weight, bias)]
        expected, eager = ACTIVATIONS[act](F.linear(*wide)), ACTIVATIONS[act](F.linear(x, weight, bias))
        sizes.append(F.linear(x.abs(), weight.abs()).norm().item())  # a sum near zero may have lost all of its digits
        found.append((onednn.linear(x, weight, bias, act), expected, eager))
        if act is None:
            got = onednn.linear_add(x, weight, bias, residual)
            added.append((got, expected + residual, eager + residual))
    assert no_worse_together(found, sizes)
    assert not added or no_worse_together(added, sizes)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu", "selu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_pixel_propagates_only_to_its_neighbourhood(act, bad):
    parameters = block_parameters(8, 32, 3, torch.float32)
    x = torch.randn(1, 6, 6, 8)
    x[0, 2, 2, 3] = bad
    y = ops.convnext_block(x, **parameters, act=act)
    finite = y.isfinite().all(-1)[0]
    footprint = torch.zeros(6, 6, dtype=torch.bool)
    footprint[1:4, 1:4] = True
    assert torch.equal(~finite, footprint)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14), st.sampled_from([1, 3, 8, 20, 33])),
    st.sampled_from([3, 5, 7]),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=25, deadline=None)
def test_weight_gradient_of_the_depthwise_convolution(shape, side, dtype):
    check_weight_gradient(shape, side, dtype)


@pytest.mark.parametrize("shape", [(1, 57, 60, 8), (2, 130, 5, 16), (1, 3, 113, 4)])
def test_weight_gradient_on_large_maps(shape):
    check_weight_gradient(shape, 7, torch.float32)


def check_weight_gradient(shape, side, dtype):
    channels = shape[3]

    def plain(x, du):
        size = (channels, 1, side, side)
        return torch.nn.grad.conv2d_weight(nchw(x), size, nchw(du), padding=side // 2, groups=channels)

    def nchw(x):
        return x.permute(0, 3, 1, 2)

    found, sizes = [], []
    for _ in draws_for(channels * min(math.prod(shape[:3]), side * side)):
        x, du = torch.randn(2, *shape, dtype=dtype)
        found.append((onednn.dwconv_weight_grad(x, du, side), plain(x.double(), du.double()), plain(x, du)))
        sizes.append(plain(x.abs(), du.abs()).norm().item())  # a sum near zero may have lost all of its digits
    assert all(got.dtype == dtype for got, *_ in found)
    if dtype == torch.float32:
        assert no_worse_together(found, sizes)
    else:
        assert all(
            relative_error(got, exact, size) <= 1e-13 for (got, exact, _), size in zip(found, sizes, strict=True)
        )


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14), st.sampled_from([1, 3, 8, 20, 33])),
    st.integers(1, 70),
    st.sampled_from([3, 5, 7]),
    st.sampled_from(["gelu", "gelu_new", "relu", "silu", "selu"]),
    st.sampled_from([1, 40, 8192]),
)
@settings(max_examples=40, deadline=None)
def test_frozen_block(shape, hidden, side, act, most_rows):
    """By ATen calls, also cut into blocks of rows."""
    blocks, found, sizes = functools.partial(aten_layers.row_blocks, most=most_rows), [], []
    with (
        mock.patch.object(llvm, "machine_for", return_value=None),
        mock.patch.object(mlp, "row_blocks", blocks),
        mock.patch.object(aten_layers, "_LEAST_ROWS", 1),
    ):
        for _ in draws_for(math.prod(shape)):
            weights, x = frozen_weights(shape[3], hidden, side), torch.randn(shape)
            got = cpu.frozen_block_fwd(x, weights, 1e-6, act, torch.float32)
            found.append((got, plain_block(x.double(), weights, act), plain_block(x, weights, act)))
            sizes.append(x.norm().item())  # the residual may cancel what it is added to
    assert all(got.is_contiguous() for got, *_ in found)
    assert no_worse_together(found, sizes)
