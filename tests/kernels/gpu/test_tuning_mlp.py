from itertools import pairwise

import pytest
import torch
from convnext_fast.kernels.dtypes import dot_precision
from convnext_fast.kernels.integers import cdiv
from convnext_fast.kernels.mlp import tuning
from convnext_fast.kernels.mlp.tuning import (
    count_tiles,
    downsample_config,
    gemm_configs,
    split_width,
    split_width_bwd,
    tile_parts,
)
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
    """More shares would only write and read more partial sums."""
    rows = 100_000
    for (config, share), products, columns in (
        (downsample_weight_config(rows, channels, 2 * channels, 4, dtype, target), 4, 2 * channels),
        (weight_grad_config(rows, channels, 4 * channels, dtype, target), 2, 4 * channels),  # D and E
    ):
        tiles = products * cdiv(columns, config.BLOCK_M) * cdiv(channels, config.BLOCK_N)
        assert PROCESSORS[target] / 2 < tiles * cdiv(rows, share) <= max(tiles, 3.1 * PROCESSORS[target])


@pytest.mark.parametrize("columns", [320, 384, 512, 768, 1536, 3072, 8192])
def test_tiles_follow_the_number_of_rows(columns):
    """On sm_90; small ones run all at once, large ones waste no columns and go through L2 less often than squares."""
    for rows in [49 * 2**i for i in range(16)]:
        config = gemm_configs(rows, columns, torch.bfloat16, "sm_90")[0]
        tiles, area = count_tiles(rows, columns, config), config.BLOCK_M * config.BLOCK_N
        if area < 128 * 128:
            assert tiles <= PROCESSORS["sm_90"]
        elif area > 128 * 128:
            assert columns % config.BLOCK_N == 0
            assert tiles * (config.BLOCK_M + config.BLOCK_N) < cdiv(rows, 128) * cdiv(columns, 128) * 256
    assert area > 128 * 128 or columns in (320, 8192)


@pytest.mark.parametrize(
    ("rows", "columns", "tile"),
    [
        (25088, 1536, (192, 256)),
        (25088, 384, (192, 192)),  # 262 tiles for 132 processors, where 128 × 256 would be 294
        (6272, 768, (192, 192)),  # 132 tiles
        (6272, 3072, (128, 256)),  # in fc1 of 768 channels more sums would spill
    ],
)
def test_large_tiles_of_128_images(rows, columns, tile):
    config = gemm_configs(rows, columns, torch.bfloat16, "sm_90")[0]
    assert tile == (config.BLOCK_M, config.BLOCK_N)


@pytest.mark.parametrize(("before_38", "tiles"), [(False, [(128, 256), (256, 128)]), (True, [(192, 192), (128, 128)])])
@pytest.mark.parametrize(("channels", "dtype"), [(768, torch.bfloat16), (1024, torch.bfloat16), (384, torch.float16)])
def test_fc1_of_many_channels_or_in_float16_has_no_tile_that_would_spill(
    channels, dtype, before_38, tiles, monkeypatch
):
    monkeypatch.setattr(tuning, "_BEFORE_38", before_38)
    for columns in (1536, 2048):
        config = gemm_configs(25088, columns, dtype, "sm_90", False, None, False, channels)[0]
        assert (config.BLOCK_M, config.BLOCK_N) in tiles


@pytest.mark.parametrize("before_38", [False, True])
def test_weights_of_96_channels_on_sm_80_take_a_chunk_that_does_not_spill(before_38, monkeypatch):
    monkeypatch.setattr(tuning, "_BEFORE_38", before_38)
    config, _ = tuning.weight_grad_config(100_000, 96, 384, "sm_80", saved=False, half=False, grn=False)
    assert ((16, 32) if before_38 else (32, 64)) == (config.BLOCK_M, config.BLOCK_K)


@pytest.mark.parametrize("side", [16, 64, 128, 192, 256])
def test_parts_of_a_tile_are_powers_of_two(side):
    parts = tile_parts(side)
    assert [first for first, _ in parts] == [0, *(sum(part) for part in parts[:-1])]
    assert sum(parts[-1]) == side
    assert all(size & (size - 1) == 0 for _, size in parts)


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_90"])
def test_tiles_of_other_targets_do_not_depend_on_the_number_of_rows(target):
    few, many = (gemm_configs(rows, 384, torch.bfloat16, target) for rows in (49, 100_000))
    assert few == many
    few, many = (downsample_config(rows, 384, torch.bfloat16, False, target) for rows in (49, 100_000))
    assert few == many


@pytest.fixture
def matmul():
    """PyTorch's switches for float32 products, reset afterwards to their values in a new process."""
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("chosen", ["tf32", "ieee"])
@pytest.mark.parametrize("switch", ["allow_tf32", "set_float32_matmul_precision", "fp32_precision", "of all backends"])
def test_products_in_float32_follow_each_of_the_switches(matmul, switch, chosen):
    assert dot_precision(torch.float32) == "ieee"
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
    assert dot_precision(torch.float32) == chosen
    assert dot_precision(torch.half) == "ieee"
