import pytest
import torch
from convnext_fast.kernels.statistics import stats_block

WIDTHS = [40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 352, 384, 512, 640, 768, 1024, 1536, 2048, 3072]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tuned_widths_pad_less_than_a_third(dtype):
    for channels in WIDTHS:
        block = stats_block(channels, dtype)
        padded = -(-channels // block) * block
        assert padded <= 1.2 * channels
        assert channels % 32 or padded <= 1.1 * channels
