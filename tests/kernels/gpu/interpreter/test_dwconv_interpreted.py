import pytest
import torch
from convnext_fast.kernels.autotuning import SHARES
from convnext_fast.kernels.dwconv import dwconv_dgrad, dwconv_fwd, dwconv_wgrad
from convnext_fast.kernels.dwconv import wgrad as dwconv_wgrad_module
from convnext_fast.kernels.dwconv.tuning import TensorCoreConfig
from dwconv_cases import (
    check_data_gradient,
    check_forward,
    check_layer_norm,
    check_non_finite,
    check_segments,
    check_weight_gradient,
)

SHAPES = [
    ((9, 1, 1, 1), 3),
    ((3, 2, 3, 5), 3),
    ((1, 3, 2, 33), 5),
    ((3, 6, 7, 16), 5),
    ((1, 7, 13, 9), 7),
    ((1, 13, 6, 24), 7),
    ((1, 14, 14, 40), 7),
    ((1, 2, 57, 7), 7),
    ((1, 57, 1, 17), 7),
]
DTYPES = [
    pytest.param(torch.float32, None, id="fp32"),
    pytest.param(torch.float16, None, id="fp16"),
    pytest.param(torch.float16, torch.float32, id="fp16-stream-fp32"),
]


@pytest.mark.parametrize(("dtype", "stream"), DTYPES)
@pytest.mark.parametrize(("shape", "taps"), SHAPES)
def test_forward(shape, taps, dtype, stream):
    check_forward(shape, taps, dtype, stream, with_bias=shape[3] != 24)


@pytest.mark.parametrize(("dtype", "stream"), DTYPES)
@pytest.mark.parametrize(("shape", "taps"), SHAPES)
def test_data_gradient(shape, taps, dtype, stream):
    check_data_gradient(shape, taps, dtype, stream)


@pytest.mark.parametrize(("dtype", "stream"), DTYPES)
@pytest.mark.parametrize(("shape", "taps"), SHAPES)
def test_weight_gradient(shape, taps, dtype, stream):
    check_weight_gradient(shape, taps, dtype, stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("share", SHARES[1:], ids=str)
def test_every_share_of_the_autotuner(share, dtype, monkeypatch):
    monkeypatch.setattr(dwconv_wgrad_module, "SHARES", (share,))
    check_weight_gradient((9, 5, 13, 24), 5, dtype)


@pytest.mark.parametrize("tile_width", [8, 16])
@pytest.mark.parametrize(
    ("shape", "taps", "segment"), [((1, 14, 9, 16), 7, 8), ((2, 9, 17, 40), 5, 6), ((1, 9, 9, 335), 7, 1)]
)
def test_height_cut_into_segments(shape, taps, segment, tile_width):
    check_segments(shape, taps, TensorCoreConfig(tile_width, 16, segment, 8))


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, True), (torch.float16, False)])
def test_non_finite_values_stay_in_their_tile(dtype, exact):
    check_non_finite(dtype, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(0, 7, 7, 16), (2, 0, 7, 16)])
def test_empty_batch(shape, dtype):
    x, weight = torch.empty(shape, dtype=dtype), torch.randn(16, 1, 7, 7)
    u, stats = dwconv_fwd(x, weight, None, dtype)
    assert u.shape == shape
    assert stats.shape[1:] == (0, 2)
    assert dwconv_dgrad(u, weight, x, x.dtype).shape == shape
    dweight, dbias = dwconv_wgrad(x, u, 7)
    assert torch.equal(dweight, torch.zeros(16, 1, 7, 7))
    assert torch.equal(dbias, torch.zeros(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("pixels", "channels", "affine"), [(1, 1, True), (37, 40, True), (70, 335, False), (5, 768, True)]
)
def test_layer_norm(pixels, channels, affine, dtype):
    check_layer_norm(pixels, channels, dtype, affine)
