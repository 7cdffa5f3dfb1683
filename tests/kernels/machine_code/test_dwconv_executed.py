import pytest
import torch
from dwconv_cases import (
    check_data_gradient,
    check_forward,
    check_layer_norm,
    check_non_finite,
    check_weight_gradient,
)

SHAPES = [((3, 1, 3, 5), 3), ((2, 6, 13, 33), 5), ((3, 14, 14, 48), 7), ((1, 7, 57, 40), 7)]
DTYPES = [
    pytest.param(torch.float32, None, id="fp32"),
    pytest.param(torch.bfloat16, None, id="bf16"),
    pytest.param(torch.float16, torch.float32, id="fp16-stream-fp32"),
]


@pytest.fixture(autouse=True)
def _executing(emulating):
    with emulating(arch=80, detect_races="rw"):
        yield


@pytest.mark.parametrize(("dtype", "stream"), DTYPES)
@pytest.mark.parametrize(("shape", "taps"), SHAPES)
def test_forward_and_data_gradient(shape, taps, dtype, stream):
    check_forward(shape, taps, dtype, stream)
    check_data_gradient(shape, taps, dtype, stream)


@pytest.mark.parametrize(("dtype", "stream"), DTYPES)
@pytest.mark.parametrize(("shape", "taps"), SHAPES)
def test_weight_gradient(shape, taps, dtype, stream):
    check_weight_gradient(shape, taps, dtype, stream)


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, True), (torch.bfloat16, False)])
def test_non_finite_values_stay_in_their_tile(dtype, exact):
    check_non_finite(dtype, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pixels", "channels", "affine"), [(37, 40, True), (70, 335, False)])
def test_layer_norm(pixels, channels, affine, dtype):
    check_layer_norm(pixels, channels, dtype, affine)
