import pytest
import torch
from patchify_cases import DOWNSAMPLES, STEMS, check_downsample, check_stem


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stem(emulating, dtype):
    with emulating(arch=80, detect_races="rw"):
        check_stem(STEMS[0], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_downsample(emulating, dtype):
    with emulating(arch=80, detect_races="rw"):
        check_downsample(DOWNSAMPLES[0], dtype)


def test_float32(emulating, precision):
    with emulating(arch=80, detect_races="rw"):
        check_stem(STEMS[0], torch.float32)
        check_downsample(DOWNSAMPLES[0], torch.float32)


def test_an_empty_batch(emulating):
    with emulating(arch=80):
        check_stem(STEMS[-1], torch.bfloat16)
        check_downsample(DOWNSAMPLES[-1], torch.bfloat16)


def test_strided_image_and_float32_stream(emulating):
    with emulating(arch=80, detect_races="rw"):
        check_stem((2, 3, 8, 17, 24, 4), torch.bfloat16, strided=True)
        check_downsample(DOWNSAMPLES[0], torch.bfloat16, torch.float32)
