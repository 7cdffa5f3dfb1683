"""The stem on a CPU where no gradient is wanted: one matrix product on patches."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BOUNDS, relative_error

from convnext_fast import ops
from convnext_fast.backends import reference


@given(
    st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(4, 19), st.integers(4, 19)),
    st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4)),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_stem_without_gradient(shape, patch, channels_last, dtype, has_bias):
    image = torch.randn(shape, dtype=dtype)
    if channels_last:
        image = image.to(memory_format=torch.channels_last)
    channels, *kernel = patch
    weight = torch.randn(channels, shape[1], *kernel, dtype=dtype)
    bias, ln_weight, ln_bias = torch.randn(3, channels, dtype=dtype)
    arguments = (weight, bias if has_bias else None, ln_weight, ln_bias)
    with torch.no_grad():
        got = ops.patchify_stem(image, *arguments, eps=1e-3)
        expected = reference.patchify_stem(image.double(), *(t if t is None else t.double() for t in arguments), 1e-3)
    assert got.dtype == dtype
    assert got.is_contiguous()
    # LayerNorm of one or two channels divides by what may be small: the error is measured against its largest factor.
    assert relative_error(got, expected, least=30.0 if channels <= 2 else 0.0) <= BOUNDS[dtype]


def test_stem_with_and_without_gradient_agree():
    image = torch.randn(2, 3, 64, 48)
    parameters = (torch.randn(24, 3, 4, 4), torch.randn(24), torch.randn(24), torch.randn(24))
    with torch.no_grad():
        plain = ops.patchify_stem(image, *parameters)
    assert relative_error(plain, ops.patchify_stem(image, *parameters)) <= BOUNDS[torch.float32]
