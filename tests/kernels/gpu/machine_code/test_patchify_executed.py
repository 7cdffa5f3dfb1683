import pytest
import torch
from convnext_fast.kernels.mlp.tuning import downsample_config
from convnext_fast.kernels.patchify import fwd
from patchify_cases import DOWNSAMPLES, STEMS, check_downsample, check_stem

DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_stem(emulating, dtype):
    with emulating(arch=80, detect_races="rw"):
        check_stem(STEMS[0], dtype, again=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_downsample(emulating, dtype):
    with emulating(arch=80, detect_races="rw"):
        check_downsample(DOWNSAMPLES[0], dtype, again=True)


@pytest.mark.parametrize("stream", [pytest.param(torch.bfloat16, marks=pytest.mark.thorough), torch.float32])
def test_downsample_of_few_pixels(emulating, stream, monkeypatch):
    """The tiles of sm_90, here in sm_80's code."""
    few = downsample_config(1, 128, torch.bfloat16, False, "sm_90")
    monkeypatch.setattr(fwd, "downsample_config", lambda *a: few)
    with emulating(arch=80, detect_races="rw"):
        check_downsample((1, 4, 5, 150, 70, 2), torch.bfloat16, stream)


@pytest.mark.parametrize("precision", [pytest.param("ieee", marks=pytest.mark.thorough), "tf32"], indirect=True)
def test_float32(emulating, precision):
    with emulating(arch=80, detect_races="rw"):
        check_stem(STEMS[0], torch.float32)
        check_downsample(DOWNSAMPLES[0], torch.float32)


def test_an_empty_batch(emulating):
    with emulating(arch=80):
        check_stem(STEMS[-1], torch.bfloat16)
        check_downsample(DOWNSAMPLES[-1], torch.bfloat16)


def test_a_strided_image_and_a_float32_stream(emulating):
    with emulating(arch=80, detect_races="rw"):
        check_stem((2, 3, 8, 17, 24, 4), torch.bfloat16, strided=True, stream=torch.float32)
        check_downsample(DOWNSAMPLES[0], torch.bfloat16, torch.float32)
