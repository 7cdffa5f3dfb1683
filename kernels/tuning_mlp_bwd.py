"""Launch configurations of the wide pointwise MLP's backward: pure functions of shape, dtype and target.

Numbers come from compiled code (registers, spills, warp-group MMA) and from counts of bytes; none was timed.
"""

from __future__ import annotations

import torch
import triton

from .targets import PROCESSORS
from .tuning_mlp import GemmConfig


def hidden_grad_config(dtype: torch.dtype, target: str) -> GemmConfig:
    """Configuration of the two products, a and dh, of one tile of hidden units: two sums a thread, so half the tile.

    With 4 warps the epilogue spills on sm_90 and sm_100; AMD's waves are twice as wide.
    """
    if dtype == torch.float32:
        return GemmConfig(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2)
    return GemmConfig(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, num_warps=4 if target == "gfx942" else 8, num_stages=3)


def input_grad_config(columns: int, dtype: torch.dtype, target: str) -> GemmConfig:
    """Configuration of dx̂ = da·w1g with LayerNorm's backward in its epilogue."""
    if dtype == torch.float32:
        return GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2)
    return GemmConfig(BLOCK_M=128, BLOCK_N=128 if columns % 128 == 0 else 64, BLOCK_K=64, num_warps=8, num_stages=3)


def weight_grad_config(
    rows: int, channels: int, hidden: int, dtype: torch.dtype, target: str
) -> tuple[GemmConfig, int]:
    """(configuration, pixels of a share) of D and E: tiles of (hidden units, channels), BLOCK_K pixels a step.

    As many shares as fill every processor with about two programs; a share is a multiple of BLOCK_K.
    """
    if dtype == torch.float32:
        config = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2)
    else:
        columns = 128 if channels % 128 == 0 else 64
        config = GemmConfig(BLOCK_M=128, BLOCK_N=columns, BLOCK_K=32, num_warps=4, num_stages=3)
    tiles = 2 * triton.cdiv(hidden, config.BLOCK_M) * triton.cdiv(channels, config.BLOCK_N)
    shares = max(1, 2 * PROCESSORS[target] // tiles)
    return config, triton.cdiv(triton.cdiv(rows, shares), config.BLOCK_K) * config.BLOCK_K
