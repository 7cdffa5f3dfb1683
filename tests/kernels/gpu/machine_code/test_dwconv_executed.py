import itertools

import pytest
import torch
from convnext_fast.kernels.dwconv import dwconv_fwd, gluon_wgrad
from convnext_fast.kernels.dwconv.gluon import AVAILABLE
from convnext_fast.kernels.dwconv.tuning import GluonWgradConfig
from convnext_fast.kernels.statistics import stats_block
from dwconv_cases import (
    check_data_gradient,
    check_forward,
    check_layer_norm,
    check_non_finite,
    check_weight_gradient,
    draw,
)
from kernel_support import dwconv_reference, merged_statistics

SHAPES = [((3, 1, 3, 5), 3), ((2, 6, 13, 33), 5), ((3, 14, 14, 48), 7), ((1, 7, 57, 40), 7)]


def in_dtypes(shapes, few):
    """By default the first ``few`` shapes, alternately in one of the two 16-bit dtypes, which take the same kernels;
    every second shape also in float32.
    """
    dtypes = (torch.bfloat16, None), (torch.float16, torch.float32), (torch.float32, None)
    for (number, (shape, taps)), (of, case) in itertools.product(enumerate(shapes), enumerate(dtypes)):
        chosen = number < few and number % 2 == of % 2
        yield pytest.param(shape, taps, *case, marks=() if chosen else pytest.mark.thorough)


@pytest.fixture(autouse=True)
def _executing(emulating):
    with emulating(arch=80, detect_races="rw"):
        yield


@pytest.mark.parametrize(("shape", "taps", "dtype", "stream"), list(in_dtypes(SHAPES, 3)))
def test_forward_and_data_gradient(shape, taps, dtype, stream):
    check_forward(shape, taps, dtype, stream)
    check_data_gradient(shape, taps, dtype, stream)


@pytest.mark.parametrize(
    ("shape", "taps", "dtype", "stream"),
    list(in_dtypes([*SHAPES, ((5, 3, 2, 8), 3), ((2, 13, 17, 24), 5), ((9, 5, 12, 32), 7)], 7)),
)
def test_weight_gradient(shape, taps, dtype, stream):
    check_weight_gradient(shape, taps, dtype, stream, again=shape == SHAPES[2][0])


@pytest.mark.thorough
@pytest.mark.skipif(not AVAILABLE, reason="needs Gluon as Triton has it from 3.6 on")
def test_weight_gradient_in_explicit_layouts_whatever_the_configuration(monkeypatch):
    """Each gives the same sums, also with several times 16 pairs per program and with offsets of 64 bits."""
    x, _, _, du, _ = draw((9, 9, 17, 40), 7, torch.bfloat16)
    splits = [gluon_wgrad.dwconv_wgrad_gluon(x, du, 7, GluonWgradConfig(16, *rest)) for rest in ((4, 4, 8), (8, 2, 4))]
    taps = [partial[..., :7, :] for partial in splits]
    assert torch.equal(*taps)
    launch = gluon_wgrad.launch
    monkeypatch.setattr(gluon_wgrad, "launch", lambda *a, WIDE, **k: launch(*a, WIDE=True, **k))
    whole = gluon_wgrad.dwconv_wgrad_gluon(x, du, 7, GluonWgradConfig(32, 4, 4, 8))
    assert whole.shape[0] == 1
    # Exact products, added in float32 in another order: the random walk of a sum over all pixels.
    walk = torch.finfo(torch.float32).eps * x[..., 0].numel() ** 0.5
    torch.testing.assert_close(whole[0, :, :7], taps[0].sum(0), rtol=0, atol=walk * taps[0].abs().max().item())


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, True), (torch.bfloat16, False)])
def test_non_finite_values_stay_in_their_tile(dtype, exact):
    check_non_finite(dtype, exact)


@pytest.mark.parametrize(
    ("pixels", "channels", "affine", "dtype"),
    [
        (37, 40, True, torch.float32),
        (70, 335, False, torch.bfloat16),
        pytest.param(37, 40, True, torch.bfloat16, marks=pytest.mark.thorough),
        pytest.param(70, 335, False, torch.float32, marks=pytest.mark.thorough),
    ],
)
def test_layer_norm(pixels, channels, affine, dtype):
    check_layer_norm(pixels, channels, dtype, affine)


@pytest.mark.parametrize("offset", [10.0, 100.0])
def test_variance_of_activations_far_from_zero(offset):
    """One-pass statistics are as close to those of the unrounded activations as rounding these allows."""
    dtype = torch.float16
    x, weight, bias, _, _ = draw((2, 9, 10, 40), 7, dtype)
    bias = bias + offset
    u, stats = dwconv_fwd(x, weight, bias, dtype)
    _, got = merged_statistics(stats, stats_block(40, dtype), 40)
    rounded = u.double().reshape(-1, 40).var(1, correction=0)
    exact = dwconv_reference(x.double(), weight.double(), bias.double()).reshape(-1, 40).var(1, correction=0)
    assert (got - rounded).square().mean() <= (rounded - exact).square().mean()
