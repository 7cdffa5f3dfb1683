"""Launch configurations of the backward of the wide MLP and of patchify: pure functions of shape, dtype and target.

Numbers come from compiled code (registers, spills, warp-group MMA) and from counts of bytes; those of sm_90 were timed
(see tuning.py).
"""

from __future__ import annotations

import dataclasses

import torch

from ..integers import cdiv, next_power_of_2
from ..targets import PROCESSORS
from .tuning import GemmConfig


def hidden_grad_config(channels: int, dtype: torch.dtype, target: str, sample_rows: int | None = None) -> GemmConfig:
    """Configuration of the two products, a and dh, of one tile of hidden units: two sums per thread.

    With 4 warps the epilogue spills on sm_100; AMD's waves are twice as wide. Up to 8 blocks of statistics are merged
    in the registers of every thread of a row, which spills on sm_100 with more than 32 hidden units; 32 blocks and more
    spill on sm_120 with 128 rows, and 64 on sm_86. ``sample_rows``: as in `gemm_configs`.
    """
    if dtype == torch.float32:
        return GemmConfig(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2)
    if (target == "sm_120" and channels > 768) or (target == "sm_86" and channels > 1024):
        return GemmConfig(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3)
    if target == "sm_90" and sample_rows is None and 256 < channels <= 1536:  # half of what tiles of 64² read from L2
        return GemmConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    if target == "sm_90":  # with a norm, or with other widths, those would spill
        depth, stages = (64, 3) if channels <= 512 else (32, 4)
        warps = 8 if channels > 2048 else 4  # 4 spill with the statistics of 2,816 channels
        return GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=depth, num_warps=warps, num_stages=stages)
    columns = 32 if target == "sm_100" and channels <= 256 else 64
    if sample_rows is not None and sample_rows <= 64:
        return GemmConfig(BLOCK_M=64, BLOCK_N=columns, BLOCK_K=32, num_warps=4, num_stages=3)
    return GemmConfig(BLOCK_M=128, BLOCK_N=columns, BLOCK_K=32, num_warps=4 if target == "gfx942" else 8, num_stages=3)


def input_grad_config(columns: int, dtype: torch.dtype, target: str) -> GemmConfig:
    """Configuration of dx̂ = da·w1g with LayerNorm's backward in its epilogue."""
    if dtype == torch.float32:
        return GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2)
    stages = 4 if target == "sm_90" and columns % 128 == 0 else 3
    return GemmConfig(
        BLOCK_M=128, BLOCK_N=128 if columns % 128 == 0 else 64, BLOCK_K=64, num_warps=8, num_stages=stages
    )


def output_grad_config(rows: int, channels: int, target: str) -> tuple[int, int, int]:
    """(rows of a step, channels of a program, rows of its share): about four programs per processor."""
    block_m, block_n = 32, 128 if channels % 128 == 0 else 64
    shares = max(1, 4 * PROCESSORS[target] // cdiv(channels, block_n))
    return block_m, block_n, cdiv(cdiv(max(rows, 1), shares), block_m) * block_m


def weight_grad_config(
    rows: int, channels: int, hidden: int, dtype: torch.dtype, target: str
) -> tuple[GemmConfig, int]:
    """(configuration, pixels of a share) of D and E: tiles of (hidden units, channels), BLOCK_K pixels per step.

    As many shares as fill every processor with about two programs, or with one of 8 warps, which read less, where
    these need no second wave; a share is a multiple of BLOCK_K.
    """
    columns, programs = 128 if channels % 128 == 0 else 64, 2 * PROCESSORS[target]
    if dtype == torch.float32:
        config = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2)
    elif target == "sm_90" and columns == 128 and 2 * cdiv(hidden, 256) * (channels // 128) <= PROCESSORS[target]:
        config, programs = GemmConfig(BLOCK_M=256, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=4), programs // 2
    else:
        config = GemmConfig(BLOCK_M=128, BLOCK_N=columns, BLOCK_K=32, num_warps=4, num_stages=3)
    tiles = 2 * cdiv(hidden, config.BLOCK_M) * cdiv(channels, config.BLOCK_N)
    shares = max(1, programs // tiles)
    return config, cdiv(cdiv(rows, shares), config.BLOCK_K) * config.BLOCK_K


def stem_bwd_config(rows: int, channels: int, depth: int, target: str) -> tuple[GemmConfig, int, int]:
    """(configuration, elements of a patch of a program, patches of a share) of the stem's backward.

    All channels in a program, as in ``stem_config``, and as much of the weight's gradient as spills no register. 32
    rows give 8 warps two pixels per load. Beyond 512 channels they would not fit the shared memory of every target; at
    64 channels they would spill on sm_80 and sm_86, where 64 rows do not. On sm_90 4 warps take less than six tenths of
    the time.
    """
    width = max(16, next_power_of_2(channels))
    amd, fast = target == "gfx942", target == "sm_90" and width <= 128
    config = GemmConfig(BLOCK_M=32, BLOCK_N=width, BLOCK_K=16, num_warps=4 if fast else 8, num_stages=1)
    if amd or width > 512:
        config = dataclasses.replace(config, BLOCK_M=16)
    elif width == 64 and not fast:
        config = dataclasses.replace(config, BLOCK_M=64, BLOCK_K=16 if target == "sm_100" else 32)  # 32 would spill
    block = min(32 if channels > 96 or amd else 64, max(16, next_power_of_2(depth)), max(16, 8192 // width))
    shares = max(1, 2 * PROCESSORS[target] // cdiv(depth, block))
    return config, block, cdiv(cdiv(max(rows, 1), shares), config.BLOCK_M) * config.BLOCK_M


def downsample_input_config(channels: int, dtype: torch.dtype, target: str) -> GemmConfig:
    """Configuration of the downsampling's input gradient: a row's channels in one tile, up to 256, else in several."""
    width = max(16, next_power_of_2(channels))
    if dtype == torch.float32:
        return GemmConfig(BLOCK_M=32, BLOCK_N=min(64, width), BLOCK_K=16, num_warps=4, num_stages=2)
    columns = width if width <= 256 else 128
    stages = 3 if target == "sm_90" and columns == 128 else 2
    return GemmConfig(BLOCK_M=64, BLOCK_N=columns, BLOCK_K=32, num_warps=8, num_stages=stages)


def downsample_weight_config(
    rows: int, channels: int, columns: int, taps: int, dtype: torch.dtype, target: str
) -> tuple[GemmConfig, int]:
    """(configuration, patches of a share) of the downsampling's weight gradient, BLOCK_K patches per step."""
    if dtype == torch.float32:
        config = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2)
    elif target == "sm_90":
        config = GemmConfig(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3)
    else:
        width = 128 if channels % 128 == 0 else 64
        # Steps of 32 spill in float16 on sm_100 at C = 40 and 80, although they take only 80 registers.
        depth = 64 if target == "sm_100" and width == 64 else 32
        config = GemmConfig(BLOCK_M=64, BLOCK_N=width, BLOCK_K=depth, num_warps=4, num_stages=2)
    tiles = cdiv(columns, config.BLOCK_M) * taps * cdiv(channels, config.BLOCK_N)
    shares = max(1, round(2 * PROCESSORS[target] / tiles))
    return config, cdiv(cdiv(max(rows, 1), shares), config.BLOCK_K) * config.BLOCK_K
