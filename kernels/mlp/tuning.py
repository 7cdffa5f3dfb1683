"""Launch configurations of the pointwise MLP and of patchify: pure functions of shape, dtype and target.

Numbers come from compiled code (registers, spills, warp-group MMA) and from executed instruction counts on sm_80.
Those of sm_90 were timed, on H100 and H200 (ConvNeXt-T, -B, Triton 3.6), except the tiles for few and for many rows,
which follow the resource model (bench/static_analysis), and the backward of 129 to 192 channels: what helps there is
occupancy, two or three programs per processor, so that one's epilogue runs during another's products.
"""

from __future__ import annotations

import dataclasses
import re

import torch
import triton
from torch import Tensor

from ..integers import cdiv, next_power_of_2, remembered
from ..statistics import stats_block
from ..targets import PROCESSORS

WARP_GROUPS = ("sm_90", "sm_100")  # targets that multiply matrices by warp groups or larger
_TRITON = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
_BEFORE_38 = _TRITON < (3, 8)  # these versions spill where later ones do not; 3.7 was not tried
_FUSED_FORWARD = 192
_FUSED_BACKWARD = 128  # 192 with warp groups


@dataclasses.dataclass(frozen=True)
class FusedConfig:
    """Rows of a program BLOCK_M, hidden units of a step BLOCK_K, warps, pipeline stages."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """Tile (BLOCK_M, BLOCK_N), depth of a step BLOCK_K, warps, pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


_SMALL = (
    GemmConfig(BLOCK_M=64, BLOCK_N=32, BLOCK_K=128, num_warps=4, num_stages=4),
    GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=5),
    GemmConfig(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=4),
)
_LARGE = (
    GemmConfig(BLOCK_M=192, BLOCK_N=192, BLOCK_K=64, num_warps=8, num_stages=3),
    GemmConfig(BLOCK_M=192, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3),
    GemmConfig(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3),
    GemmConfig(BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
)


@dataclasses.dataclass(frozen=True)
class TmaConfig(GemmConfig):
    """A `GemmConfig` of a persistent kernel; HALVES: the epilogue takes half of the columns at a time."""

    HALVES: bool


@remembered
def split_width(channels: int, target: str) -> tuple[tuple[int, int], ...]:
    """Parts (first channel, width) that cover ``channels``; widths are powers of two of at least 16, an MMA's depth.

    Warp groups multiply best by few wide parts: a power of two and one for the rest. Elsewhere, and for powers of two,
    parts of one width, at most 64, share their addresses: 192 channels as 3·64 take 70 registers fewer than as
    128 + 64.
    """
    padded = cdiv(channels, 16) * 16
    first = 1 << (padded.bit_length() - 1)
    if target in WARP_GROUPS and padded > first:
        return (0, first), (first, next_power_of_2(padded - first))
    width = min(64, padded & -padded)
    return tuple((start, width) for start in range(0, padded, width))


def is_fused(channels: int, dtype: torch.dtype) -> bool:
    """Whether the forward keeps the hidden activations on the chip: narrow blocks in 16 bits."""
    return channels <= _FUSED_FORWARD and dtype != torch.float32


def is_fused_backward(channels: int, dtype: torch.dtype, target: str) -> bool:
    """Whether the backward keeps the hidden activations on the chip.

    In wider blocks the sums of a chunk of hidden units do not fit the registers. They take 2·C per unit, or C where two
    programs share them (see ``weights_apart``).
    """
    most = _FUSED_FORWARD if target in WARP_GROUPS else _FUSED_BACKWARD
    return channels <= most and dtype != torch.float32


def weights_apart(channels: int) -> bool:
    """Whether two programs of the fused backward make D and E of the same hidden units."""
    return channels > _FUSED_BACKWARD


def split_width_bwd(channels: int, target: str) -> tuple[tuple[int, int], ...]:
    """``split_width`` of the backward: beyond 128 channels parts of 64, which take 15 to 86 registers fewer."""
    if not weights_apart(channels):
        return split_width(channels, target)
    padded = cdiv(channels, 16) * 16
    whole = tuple((start, 64) for start in range(0, padded - 63, 64))
    rest = padded - 64 * len(whole)
    return (*whole, (64 * len(whole), next_power_of_2(rest))) if rest else whole


def norm_blocks(stats: Tensor | None, channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """(CB, NB) of ``merge_statistics``: one block may hold all channels; (0, 0) without statistics."""
    if stats is None:
        return 0, 0
    blocks = stats.shape[0]
    return (channels if blocks == 1 else stats_block(channels, dtype)), blocks


def are_few(rows: int, target: str) -> bool:
    """Whether tiles of 64 rows leave processors of sm_90 idle, so that the latency of a program matters most."""
    return target == "sm_90" and is_known(rows) and cdiv(rows, 64) <= PROCESSORS[target]


def are_many(rows: int, target: str) -> bool:
    """Whether every processor of sm_90 has a tile of 256 rows."""
    return target == "sm_90" and is_known(rows) and cdiv(rows, 256) >= PROCESSORS[target]


@remembered
def fused_configs(
    channels: int,
    hidden: int,
    lean: bool,
    target: str,
    grn: bool = False,
    few: bool = False,
    many: bool = False,
    wide_residual: bool = False,
) -> tuple[FusedConfig, ...]:
    """Configurations of the one-kernel forward, the default first.

    ``lean``: a is not saved; ``grn``: with a global response norm; ``few``: for rows that ``are_few``, which take
    smaller tiles; ``many``: for rows that ``are_many``; ``wide_residual``: y is float32.

    Up to 96 channels 4 warps of 32 rows each hold everything in registers, if lean, and read each weight half as often
    as 8 warps would; 8 such warps, for many rows, read it a quarter as often. Else 16 rows per warp, or half as many
    where that would spill: beyond 160 channels if a is saved, and from 97 to 160 on sm_100 beside a wide residual.
    Steps of 64 hidden units, or 32 where 64 would be half empty or would spill. sm_90 has the shared memory for a third
    stage. With a norm, but without warp groups, steps of 32, and beyond 160 channels 4 warps and steps of 16.
    """
    if grn and target not in WARP_GROUPS:
        norm = FusedConfig(BLOCK_M=128, BLOCK_K=32, num_warps=4 if target == "gfx942" else 8, num_stages=2)
        small = FusedConfig(BLOCK_M=64, BLOCK_K=16, num_warps=4, num_stages=2)
        return (norm, small) if channels <= 160 else (small,)
    shallow = hidden % 64 != 0 or (channels > 160 and (grn or not lean)) or (channels > 128 and target == "gfx942")
    deep = 32 if shallow else 64
    stages = 3 if target == "sm_90" and channels > 96 else 2
    short = (channels > 160 and not lean) or (96 < channels <= 160 and wide_residual and target == "sm_100")
    wide = FusedConfig(BLOCK_M=64 if short else 128, BLOCK_K=deep, num_warps=8, num_stages=stages)
    others = (
        dataclasses.replace(wide, BLOCK_K=32, num_stages=4 if deep == 32 else 3),
        FusedConfig(BLOCK_M=64, BLOCK_K=32, num_warps=4, num_stages=2),
    )
    if few and lean and not grn and hidden % 128 == 0:
        small = FusedConfig(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3)
        return small if channels <= 96 else dataclasses.replace(wide, BLOCK_M=64), wide, *others
    if channels <= 96 and lean:
        tall = many and not grn and channels > 64  # fewer channels leave room for more programs
        first = dataclasses.replace(wide, BLOCK_M=256, num_stages=3) if tall else dataclasses.replace(wide, num_warps=4)
        return first, wide, *others
    return wide, *others


def gemm_configs(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    target: str,
    heavy: bool = False,
    sample_rows: int | None = None,
    wide: bool = False,
    channels: int = 0,
) -> tuple[GemmConfig, ...]:
    """Configurations of a GEMM of ``rows`` by ``columns`` with a fused epilogue, the default first.

    ``heavy``: a is saved with h, or there is a global response norm. ``sample_rows``: where every sample has tiles of
    its own, its rows. ``wide``: the result is float32. ``channels``: of fc1 those of its input.

    On sm_90, by the resource model: the smallest tiles that do not outnumber the processors, with many loads ahead; if
    all tiles do, those whose ``_cost`` is least.
    """
    usual = _gemm_configs(columns, dtype, target, heavy, sample_rows)
    if target != "sm_90" or dtype == torch.float32 or sample_rows is not None or not is_known(rows):
        return usual
    for config in _SMALL:
        if count_tiles(rows, columns, config) <= PROCESSORS[target]:
            return config, *usual[:3]
    if heavy or columns > 3072:
        return usual
    large = _LARGE
    if columns > 2048 or channels >= 768 or (channels and dtype == torch.float16):
        # Else fc1 would spill with many statistics, and in float16, whose activations take more registers.
        large = _LARGE[:1] if channels and _BEFORE_38 else _LARGE[2:]
    elif wide:
        large = _LARGE[:1] + _LARGE[2:]  # else fc2 of 256 channels would
    fitting = [usual[0], *(config for config in large if columns % config.BLOCK_N == 0)]
    best = min(fitting, key=lambda config: _cost(rows, columns, config, PROCESSORS[target]))
    return usual if best == usual[0] else (best, *usual[:3])


def _cost(rows: int, columns: int, config: GemmConfig, processors: int) -> int:
    """What a step in depth takes: the sides of tiles, read through the L2 cache, and the areas a processor multiplies.

    On an H200 a unit of one takes about as long as a unit of the other, by the rates of the resource model.
    """
    tiles = count_tiles(rows, columns, config)
    return tiles * (config.BLOCK_M + config.BLOCK_N) + cdiv(tiles, processors) * config.BLOCK_M * config.BLOCK_N


@remembered
def tile_parts(side: int) -> tuple[tuple[int, int], ...]:
    """Parts (first, size) of a tile's rows or columns, each a power of two: 192 are 64 and 128.

    The smaller comes first: once it is finished, the registers of its sums are free for the larger one's epilogue.
    """
    small = side & -side
    return ((0, small),) if small == side else ((0, small), (small, side - small))


def is_known(rows: int) -> bool:
    """Whether this is a number, not a compiler's symbol, on which a comparison would add a guard."""
    return isinstance(rows, int)


def count_tiles(rows: int, columns: int, config: GemmConfig) -> int:
    """Tiles of a GEMM."""
    return cdiv(rows, config.BLOCK_M) * cdiv(columns, config.BLOCK_N)


@remembered
def _gemm_configs(
    columns: int, dtype: torch.dtype, target: str, heavy: bool, sample_rows: int | None
) -> tuple[GemmConfig, ...]:
    """``gemm_configs`` for a number of rows between few and many.

    Up to 64 rows of a sample a tile of 128 would be half empty, and on sm_100 4 warps would spill beyond 8,192 columns.

    On sm_90 4 warps, two programs per processor, take 71 to 89 % of the time of 8 warps; beyond 3,072 columns, or where
    it is ``heavy``, they would spill.
    """
    if dtype == torch.float32:
        return (GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=2),)
    if sample_rows is not None and sample_rows <= 64:
        warps = 8 if columns > 8192 and target == "sm_100" else 4
        short = GemmConfig(BLOCK_M=64, BLOCK_N=128 if columns > 64 else 64, BLOCK_K=64, num_warps=warps, num_stages=3)
        return short, dataclasses.replace(short, BLOCK_K=32, num_stages=4)
    narrow = GemmConfig(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3)
    if columns <= 64:
        return narrow, dataclasses.replace(narrow, BLOCK_K=32, num_stages=4)
    square = GemmConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    if target == "sm_90" and columns <= 3072 and not heavy:
        square = dataclasses.replace(square, num_warps=4)
    return (
        square,
        dataclasses.replace(square, num_stages=2),
        dataclasses.replace(square, BLOCK_K=32, num_stages=4),
        narrow,
    )


@remembered
def tma_config(target: str, fc1: bool, heavy: bool) -> TmaConfig | None:
    """Configuration of a persistent GEMM, fc1 or fc2, that TMA feeds; None if Triton supports none on the target.

    On sm_90 two groups of 4 warps share a tile. One of 128 × 256 needs three quarters of the bytes of 128 × 128, but
    would spill where fc1 stores a with h, or fc2 has a residual in float32: these are ``heavy``. Triton 3.6 cannot
    divide halves of the columns among the groups: there the epilogue takes a whole tile, so fc2's must be small.
    """
    if target == "sm_90" and _TRITON >= (3, 6):
        halves = _TRITON > (3, 6)
        if heavy or not (fc1 or halves):
            return TmaConfig(128, 128, BLOCK_K=64, num_warps=4, num_stages=4, HALVES=halves)
        rows, columns = (128, 256) if fc1 else (256, 128)
        return TmaConfig(rows, columns, BLOCK_K=64, num_warps=4, num_stages=3, HALVES=halves)
    if target == "sm_100" and _TRITON >= (3, 9):
        return TmaConfig(128, 128, BLOCK_K=64, num_warps=8, num_stages=4, HALVES=not fc1)
    return None


def statistics_first(channels: int, target: str) -> bool:
    """Whether fc1 merges LayerNorm's statistics before its product or after: the order that spills no register."""
    if target == "sm_90":
        return channels <= 256
    return target in WARP_GROUPS or (target in ("sm_80", "sm_86") and channels > 768)


def input_grad_config(channels: int, dtype: torch.dtype, target: str, grn: bool) -> FusedConfig:
    """Configuration of the backward kernel that owns pixels: 16 rows per warp, with their x̂, dz' and dx̂.

    8 warps on sm_90 read each weight half as often, unless a norm makes them spill. float16's GELU takes more
    registers than bfloat16's: with more than 96 channels it spills on sm_120.
    """
    if target == "sm_90" and not grn:
        return FusedConfig(BLOCK_M=128, BLOCK_K=64, num_warps=8, num_stages=3 if channels <= 96 else 2)
    shallow = dtype == torch.float16 and channels > 96 and target == "sm_120"
    stages = 3 if grn and _third_stage(channels, target) else 2
    return FusedConfig(BLOCK_M=64, BLOCK_K=16 if shallow else 32, num_warps=4, num_stages=stages)


def _third_stage(channels: int, target: str) -> bool:
    """Whether a third stage takes fewer registers with a global response norm."""
    return channels <= 48 and target in ("sm_80", "sm_86", "sm_100")


def weight_grad_config(
    rows: int, channels: int, hidden: int, target: str, saved: bool, half: bool, grn: bool
) -> tuple[FusedConfig, int]:
    """(configuration, rows of a share) of the backward kernel that owns hidden units.

    ``saved``: a was saved; ``grn``: with a global response norm; lean: neither; ``half``: u is float16. The sums take
    2·C registers per hidden unit. With a norm, these avoid spills: one stage on sm_90 (128 channels); without
    warp-group MMA, fewer loads ahead (96 channels), or 2 warps with half the rows and hidden units, or beyond 96
    channels fewer hidden units. Parts of 16 channels take twice the rows, for loads of 16 bytes, where these do not
    spill. There are as many shares as give every processor about two programs, or one of 8 warps; a share is a multiple
    of BLOCK_M. Programs that share the sums take 128 hidden units, because every program reads its pixels again; with
    96 channels on sm_90 that takes 86 to 89 % of the whole backward's time, but in float16 it spills.
    """
    narrow = split_width(channels, target)[-1][1] == 16
    lean = not (saved or grn)
    if weights_apart(channels) or (target == "sm_90" and channels == 96 and not (saved or half or grn)):
        config = FusedConfig(BLOCK_M=32 if grn else 64, BLOCK_K=128, num_warps=8, num_stages=2)
    elif target in WARP_GROUPS and narrow and not (grn and channels > 48):
        config = FusedConfig(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=2 if lean else 1)
    elif target in WARP_GROUPS or target == "gfx942" or (channels <= 64 and lean and not narrow):
        stages = 1 if grn and target == "sm_90" and channels > 96 else 2
        config = FusedConfig(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=stages)
    elif channels == 96 and lean and target == "sm_80" and not _BEFORE_38:
        config = FusedConfig(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=1)
    elif channels <= 96:
        block_rows = 32 if narrow and channels <= 48 else 16
        stages = 3 if grn and _third_stage(channels, target) else 2
        config = FusedConfig(BLOCK_M=block_rows, BLOCK_K=32, num_warps=2, num_stages=stages)
    else:
        config = FusedConfig(BLOCK_M=32, BLOCK_K=32, num_warps=4, num_stages=3)
    chunks = cdiv(hidden, config.BLOCK_K) * (2 if weights_apart(channels) else 1)
    shares = max(1, (1 if config.BLOCK_K == 128 else 2) * PROCESSORS[target] // chunks)
    return config, cdiv(cdiv(rows, shares), config.BLOCK_M) * config.BLOCK_M


def stem_config(channels: int) -> GemmConfig:
    """Configuration of the stem: all channels in a program, and as many rows as 8,192 sums allow, 16 at least."""
    width = max(16, next_power_of_2(channels))
    rows = min(64, max(16, 8192 // width))
    return GemmConfig(BLOCK_M=rows, BLOCK_N=width, BLOCK_K=16, num_warps=4 if width <= 256 else 8, num_stages=1)


def downsample_config(rows: int, columns: int, dtype: torch.dtype, wide: bool, target: str) -> GemmConfig:
    """Configuration of the downsampling GEMM: its left operand is normalised in registers on the way.

    Every tile of columns does this again, so sm_90 takes wide ones: half to four fifths of the time. By the resource
    model, few pixels take tiles of 16 rows, whose chain is shorter, and many take 128, which read fewer weights.

    ``wide``: x is float32 with weights of 16 bits, so that a step of 64, or 128 rows, would spill. 4 warps would, too,
    at 128 channels on sm_120 and at 160 on sm_80 and sm_86; at 192 and 256 channels on sm_100 it is 8 that would.
    """
    if dtype == torch.float32:
        return GemmConfig(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2)
    warps = 8 if wide and target in ("sm_80", "sm_86", "sm_120") else 4
    usual = GemmConfig(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32 if wide else 64, num_warps=warps, num_stages=2)
    if target != "sm_90":
        return usual
    few = GemmConfig(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3)
    if is_known(rows) and count_tiles(rows, columns, few) <= 4 * PROCESSORS[target]:
        return few
    many = GemmConfig(BLOCK_M=128, BLOCK_N=256, BLOCK_K=32, num_warps=8, num_stages=3)
    if columns <= 128:
        return usual
    if wide or not is_known(rows) or count_tiles(rows, columns, many) < 2 * PROCESSORS[target]:
        return dataclasses.replace(many, BLOCK_M=64, BLOCK_K=32 if wide or columns <= 512 else 64)
    return many
