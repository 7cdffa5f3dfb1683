from itertools import pairwise

import pytest
import torch
from convnext_fast.kernels.integers import cdiv
from convnext_fast.kernels.mlp.tuning import dot_precision, split_width, split_width_bwd
from convnext_fast.kernels.mlp.tuning_bwd import downsample_weight_config, weight_grad_config
from convnext_fast.kernels.targets import PROCESSORS, TARGETS

TUNED = (40, 48, 64, 80, 96, 128, 160, 192)


@pytest.mark.parametrize("split", [split_width, split_width_bwd])
@pytest.mark.parametrize("target", TARGETS)
def test_parts_cover_the_width_and_waste_little(target, split):
    for channels in range(1, 193):
        parts = split(channels, target)
        assert parts[0][0] == 0
        for (first, width), (following, _) in pairwise(parts):
            assert first + width == following
        assert all(width >= 16 and width & (width - 1) == 0 for _, width in parts)
        covered = sum(parts[-1])
        assert covered >= channels
        assert covered - parts[-1][1] < channels
        assert channels not in TUNED or covered <= 1.2 * channels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels", [96, 128, 192, 256, 384])
def test_programs_of_the_weight_gradients_fill_the_chip(channels, target, dtype):
    """More shares than that are partial sums that are written and read in vain."""
    rows = 100_000
    for (config, share), products, columns in (
        (downsample_weight_config(rows, channels, 2 * channels, 4, dtype, target), 4, 2 * channels),
        (weight_grad_config(rows, channels, 4 * channels, dtype, target), 2, 4 * channels),  # D and E
    ):
        tiles = products * cdiv(columns, config.BLOCK_M) * cdiv(channels, config.BLOCK_N)
        assert PROCESSORS[target] / 2 < tiles * cdiv(rows, share) <= max(tiles, 3.1 * PROCESSORS[target])


@pytest.fixture
def matmul():
    """PyTorch's switches for float32 products, put back afterwards to what they are in a new process."""
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("chosen", ["tf32", "ieee"])
@pytest.mark.parametrize("switch", ["allow_tf32", "set_float32_matmul_precision", "fp32_precision", "of all backends"])
def test_products_in_float32_follow_each_of_the_switches(matmul, switch, chosen):
    x = torch.zeros(1)
    assert dot_precision(x) == "ieee"
    if switch == "allow_tf32":
        matmul.allow_tf32 = chosen == "tf32"
    elif switch == "set_float32_matmul_precision":
        torch.set_float32_matmul_precision("high" if chosen == "tf32" else "highest")
    elif not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("PyTorch 2.9 brought this switch")
    elif switch == "fp32_precision":
        matmul.fp32_precision = chosen
    else:
        torch.backends.fp32_precision = chosen
    assert dot_precision(x) == chosen
    assert dot_precision(x.half()) == "ieee"
