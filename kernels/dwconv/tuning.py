"""Launch configurations of the depthwise convolution: pure functions of shape, dtype and target.

Numbers come from compiled code (registers, spills) and from executed instruction counts on sm_80; those of sm_90 were
timed (see tuning.py).
"""

from __future__ import annotations

import dataclasses

import torch

from ..integers import cdiv, remembered
from ..targets import PROCESSORS, SHARED_BYTES


def _lanes(target: str) -> int:
    """Threads of a warp."""
    return 64 if target == "gfx942" else 32


@dataclasses.dataclass(frozen=True)
class TensorCoreConfig:
    """Tile width TW, channels of a sweep DB, output rows of a segment (the height when it is not cut), warps."""

    tile_width: int
    dot_channels: int
    segment: int
    num_warps: int


def segment_rows(height: int, taps: int, pairs: int, blocks: int, slots: int) -> int:
    """Output rows of a program that give the shortest launch; ``height`` if cutting it gains nothing.

    ``pairs`` (image, width-tile) of a whole height, 16 per program, times ``blocks`` of channels; ``slots`` programs
    run at a time. A program of s rows takes s + taps − 1 input rows (height if whole), plus about 4 rows' time to set
    up. Segments of m·taps + 1 rows fill their groups of ``taps`` input rows exactly; those of 2 and 4 are for few
    images.
    """
    best, best_time = height, cdiv(cdiv(pairs, 16) * blocks, slots) * (height + 4)
    for segment in (*range(height // taps * taps + 1, 0, -taps), 4, 2):
        if segment >= height:
            continue
        programs = cdiv(pairs * cdiv(height, segment), 16) * blocks
        time = cdiv(programs, slots) * (segment + taps - 1 + 4)
        if time < best_time:
            best, best_time = segment, time
    return best


def tensor_core_config(shape: tuple[int, int, int, int], taps: int, block: int, target: str) -> TensorCoreConfig:
    """Configuration of tensor_core.py for x of ``shape`` (N, H, W, C) and ``block`` channels per program.

    AMD's matrix instructions are 16 wide, hence tiles of 16. With 4 wavefronts each may have 512 registers, enough for
    8 channels. Elsewhere 16 channels on 8 warps spill on no target.
    """
    batch, height, width, channels = shape
    amd = target == "gfx942"
    tile_width = 16 if amd else 8
    pairs = batch * cdiv(width, tile_width)
    segment = segment_rows(height, taps, pairs, cdiv(channels, block), PROCESSORS[target])
    return TensorCoreConfig(tile_width, dot_channels=8 if amd else 16, segment=segment, num_warps=4 if amd else 8)


@dataclasses.dataclass(frozen=True)
class GluonConfig:
    """Output rows of a segment (the height when it is not cut), rows of x in shared memory at a time."""

    segment: int
    stages: int


@remembered
def gluon_config(shape: tuple[int, int, int, int], taps: int, block: int, itemsize: int, target: str) -> GluonConfig:
    """Configuration of gluon.py for x of ``shape`` (N, H, W, C), ``itemsize`` bytes per element.

    A row of x in shared memory takes 256·block elements, and a finished row 128·block of 16 bits. Shared memory holds
    four rows of x, three of them ahead, where they fit (float32 rows then take 71 to 84 % of the time that two take on
    sm_90), else two. A program's 16 pairs share one segment.
    """
    batch, height, width, channels = shape
    pairs = cdiv(batch * cdiv(width, 8), 16) * 16
    segment = segment_rows(height, taps, pairs, cdiv(channels, block), PROCESSORS[target])
    fits = (4 * 256 * itemsize + 2 * 128) * block <= SHARED_BYTES[target]
    return GluonConfig(segment=segment, stages=4 if fits else 2)


def residual_early(config: GluonConfig, taps: int, block: int, itemsize: int, target: str) -> bool:
    """Whether a residual of ``itemsize`` bytes beside x of 16 bits is copied with the rows, STAGES − 1 early.

    The last ``taps // 2`` output rows have no input row of their own, hence the stages. A row of x takes 256·block
    elements, one of the residual 128·block, and so does a finished row.
    """
    taken = (config.stages * (2 * 256 + itemsize * 128) + 2 * 128) * block
    return config.stages > taps // 2 and taken <= SHARED_BYTES[target]


@remembered
def segment_candidates(
    config: TensorCoreConfig | GluonConfig, height: int
) -> tuple[TensorCoreConfig | GluonConfig, ...]:
    """``config`` and the same with other segments: the whole height, half of it, 4 rows."""
    others = (rows for rows in (height, cdiv(height, 2), 4) if rows <= height)
    return tuple(dict.fromkeys((config, *(dataclasses.replace(config, segment=rows) for rows in others))))


@dataclasses.dataclass(frozen=True)
class ScalarConfig:
    """Outputs along the width of a thread TW, rows of a program BR, warps."""

    tile_width: int
    block_rows: int
    num_warps: int


def scalar_config(shape: tuple[int, int, int, int], block: int, target: str) -> ScalarConfig:
    """Configuration of scalar.py for x of ``shape`` (N, H, W, C) and ``block`` channels per program.

    Tiles of 7 fit every stage of an image whose side is a multiple of 224 and hold 56 sums per thread; 4 channels of
    two rows are a thread's share. Narrow maps take narrow tiles.
    """
    threads = 4 * _lanes(target)
    share = 8 if shape[3] % 4 == 0 else 4
    return ScalarConfig(tile_width=min(7, shape[2]), block_rows=share * threads // block, num_warps=4)


def scalar_candidates(config: ScalarConfig) -> tuple[ScalarConfig, ...]:
    """``config``, and half as many outputs per thread."""
    return config, dataclasses.replace(config, block_rows=max(1, config.block_rows // 2))


@dataclasses.dataclass(frozen=True)
class WgradConfig:
    """Tile width TW, channels of a program, items of a program, rows taken at a time (scalar form), warps, rows ahead.

    An item is a pair (image, tile) in the tensor-core form and an image row in the scalar form.
    """

    tile_width: int
    block_channels: int
    split: int
    block_rows: int
    num_warps: int
    ahead: int = 0


def wgrad_config(shape: tuple[int, int, int, int], dtype: torch.dtype, target: str, wide: bool) -> WgradConfig:
    """Configuration of wgrad.py for x of ``shape`` (N, H, W, C), ``wide`` if float32, and du of ``dtype``.

    A program takes as many items as leave two programs per processor, because each writes its own partial sums. On
    sm_90 smaller ones, four per processor, with a row loaded ahead, take half (float32 x) to nine tenths of the time.
    """
    batch, height, width, channels = shape
    programs = 2 * PROCESSORS[target]
    if dtype == torch.float32:
        block = 64 if channels > 32 else 32
        block_rows = 4 * 4 * _lanes(target) // block
        splits = max(1, programs // (cdiv(channels, block) * 7))
        split = cdiv(cdiv(batch * height, splits), block_rows) * block_rows
        return WgradConfig(min(7, width), block, max(split, block_rows), block_rows, 4)
    # One channel per warp fits NVIDIA's 128 registers per thread; two fit AMD's 256, or one of float32 rows.
    tile_width, block = (16, 8 if wide else 16) if target == "gfx942" else (8, 8)
    warps, ahead = 8, 0
    if target == "sm_90":
        block, warps, ahead, programs = 4 if wide else 8, 4, 1, 2 * programs
    splits = max(1, programs // cdiv(channels, block))
    split = cdiv(cdiv(batch * cdiv(width, tile_width), splits), 16) * 16
    return WgradConfig(tile_width, block, max(split, 16), 1, warps, ahead)


@dataclasses.dataclass(frozen=True)
class GluonWgradConfig:
    """Pairs (image, tile) of a program, warps of 4 channels, rows in shared memory at a time, rows unrolled."""

    split: int
    num_warps: int
    stages: int
    unroll: int


def gluon_wgrad_config(shape: tuple[int, int, int, int], itemsize: int, target: str) -> GluonWgradConfig:
    """Configuration of gluon_wgrad.py for x of ``shape`` (N, H, W, C), ``itemsize`` bytes per element.

    A thread takes nearly 255 registers, so 8 warps fill a processor: one program of 32 channels, whose reads are whole
    sectors, or two of 16 where 32 would leave channels idle. Of 16-bit rows, four are in shared memory. 8 are unrolled,
    after which the ring has turned by only one row, or 4 if that leaves fewer rows beyond the last one. Of float32
    rows, three are in shared memory where they fit, else two, and as many are unrolled: more would spill.
    """
    if itemsize == 2:
        stages, unroll = 4, 8 if -shape[1] % 8 < 4 else 4
    else:
        stages = 3 if 3 * (256 * itemsize + 128 * 2) * 32 <= SHARED_BYTES[target] else 2
        unroll = stages
    return GluonWgradConfig(gluon_wgrad_split(shape, target), _wgrad_warps(shape[3]), stages, unroll)


def _wgrad_warps(channels: int) -> int:
    return 8 if channels % 32 == 0 else 4


def gluon_wgrad_split(shape: tuple[int, int, int, int], target: str) -> int:
    """Pairs of a program: as few as leave one program per place, because each writes its own partial sums."""
    batch, _, width, channels = shape
    warps = _wgrad_warps(channels)
    programs = cdiv(batch * cdiv(width, 8), 16) * cdiv(channels, 4 * warps)
    return 16 * (cdiv(programs, PROCESSORS[target] * (8 // warps)) or 1)


def gluon_wgrad_candidates(config: GluonWgradConfig) -> tuple[GluonWgradConfig, ...]:
    """``config``, and half the channels per program; partial sums keep their shape."""
    return tuple(dict.fromkeys((config, dataclasses.replace(config, num_warps=4))))
