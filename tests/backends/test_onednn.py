"""The calls of ATen and oneDNN behind the CPU path: values, shapes, non-finite inputs."""

import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from block_cases import block_parameters
from frozen_support import frozen_weights, plain_block
from hypothesis import given, settings
from hypothesis import strategies as st
from support import no_worse, relative_error

from convnext_fast import ops
from convnext_fast.backends.cpu import llvm, mlp, onednn, row_blocks
from convnext_fast.backends.cpu import ops as cpu

ACTIVATIONS = {None: lambda t: t, "gelu": F.gelu, "gelu_new": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu}
needs_onednn = pytest.mark.skipif(not onednn.supports(torch.empty(1)), reason="PyTorch here has no oneDNN on x86")


@needs_onednn
@pytest.mark.parametrize("act", ACTIVATIONS)
@given(rows=st.integers(1, 40), channels=st.integers(1, 40), hidden=st.integers(1, 70), layout=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_linear(act, rows, channels, hidden, layout):
    x = torch.randn(rows, channels)
    weight = torch.randn(channels, hidden).t() if layout & 1 else torch.randn(hidden, channels)
    bias = torch.randn(hidden) if layout & 2 else None
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    expected = ACTIVATIONS[act](F.linear(*wide))
    eager = ACTIVATIONS[act](F.linear(x, weight, bias))
    size = F.linear(x.abs(), weight.abs()).norm().item()  # a sum near zero may have lost all of its digits
    assert no_worse(onednn.linear(x, weight, bias, act), expected, eager, size)
    if act is None:
        residual = torch.randn(rows, hidden)
        got = onednn.linear_add(x, weight, bias, residual)
        assert no_worse(got, expected + residual, eager + residual, size)


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
    x, du = torch.randn(2, *shape, dtype=dtype)
    channels = shape[3]

    def eager(dtype):
        nchw = [t.to(dtype).permute(0, 3, 1, 2) for t in (x, du)]
        size = (channels, 1, side, side)
        return torch.nn.grad.conv2d_weight(nchw[0], size, nchw[1], padding=side // 2, groups=channels)

    expected = eager(torch.float64)
    got = onednn.dwconv_weight_grad(x, du, side)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    bound = 1e-13 if dtype == torch.float64 else 2 * relative_error(eager(dtype), expected) + 1e-6
    assert relative_error(got, expected) <= bound


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
    weights, x = frozen_weights(shape[3], hidden, side), torch.randn(shape)
    blocks = functools.partial(row_blocks.row_blocks, most=most_rows)
    with (
        mock.patch.object(llvm, "machine_for", return_value=None),
        mock.patch.object(mlp, "row_blocks", blocks),
        mock.patch.object(row_blocks, "_LEAST_ROWS", 1),
    ):
        expected, eager = plain_block(x.double(), weights, act), plain_block(x, weights, act)
        got = cpu.frozen_block_fwd(x, weights, 1e-6, act, torch.float32)
    assert got.is_contiguous()
    assert relative_error(got, expected) <= 2 * relative_error(eager, expected) + 1e-6
