import pytest
import torch
from patchify_cases import DOWNSAMPLES, STEMS, check_downsample, check_stem


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [STEMS[0], STEMS[-1]], ids=str)
def test_stem(emulating, case, dtype):
    with emulating(arch=80, detect_races="rw"):
        check_stem(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [DOWNSAMPLES[0], DOWNSAMPLES[-1]], ids=str)
def test_downsample(emulating, case, dtype):
    with emulating(arch=80, detect_races="rw"):
        check_downsample(case, dtype)


def test_strided_image_and_float32_stream(emulating):
    with emulating(arch=80, detect_races="rw"):
        check_stem((2, 3, 8, 17, 24, 4), torch.bfloat16, strided=True)
        check_downsample(DOWNSAMPLES[0], torch.bfloat16, torch.float32)
