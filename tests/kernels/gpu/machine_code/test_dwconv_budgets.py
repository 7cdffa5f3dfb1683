"""Thread instructions per output (with padding, overhang and statistics), bytes and sectors, as executed on sm_80.

The maps are whole, the batch is the smallest that fills a program's 16 pairs.
"""

import dataclasses

import pytest
import torch
from convnext_fast.kernels.dwconv.gluon import AVAILABLE, dwconv_gluon
from convnext_fast.kernels.dwconv.gluon_wgrad import dwconv_wgrad_gluon
from convnext_fast.kernels.dwconv.scalar import dwconv_scalar
from convnext_fast.kernels.dwconv.tensor_core import dwconv_tensor_core
from convnext_fast.kernels.dwconv.tuning import (
    GluonConfig,
    TensorCoreConfig,
    WgradConfig,
    gluon_config,
    gluon_wgrad_config,
)
from convnext_fast.kernels.dwconv.wgrad import add_partials, dwconv_wgrad
from convnext_fast.kernels.integers import cdiv
from convnext_fast.kernels.statistics import stats_block
from dwconv_cases import check_data_gradient, check_statistics, draw
from kernel_support import assert_as_good_as_eager, dwconv_reference

BF16, thorough = torch.bfloat16, pytest.mark.thorough
needs_gluon = pytest.mark.skipif(not AVAILABLE, reason="needs Gluon as Triton has it from 3.6 on")


def _whole(shape, itemsize=2):
    config = gluon_config(shape, 7, stats_block(shape[3], BF16), itemsize, "sm_80")
    return dataclasses.replace(config, segment=shape[1])


@needs_gluon
@pytest.mark.parametrize(
    ("shape", "budget"),
    [
        pytest.param((16, 56, 56, 64), 20, marks=thorough),
        ((4, 28, 28, 64), 20),
        pytest.param((8, 14, 14, 96), 20, marks=thorough),
        ((16, 7, 7, 64), 30),
    ],
)
def test_forward_and_data_gradient_in_bfloat16(emulating, shape, budget):
    x, weight, bias, du, dy = draw(shape, 7, BF16)
    with emulating(arch=80, detect_races="rw") as forward:
        u, stats = dwconv_gluon(
            x, weight, bias, None, dtype=BF16, out_dtype=BF16, flip=False, statistics=True, config=_whole(shape)
        )
    reference = dwconv_reference(x.double(), weight.double(), bias.double())
    assert_as_good_as_eager(u, dwconv_reference(x, weight, bias), reference)
    check_statistics(stats, u, BF16)
    count = forward.launches[0]
    assert count.thread_instructions <= budget * u.numel()
    once = x.nbytes + u.nbytes + weight.nbytes + bias.nbytes
    assert count.unique_bytes_read + count.unique_bytes_written <= 1.1 * once
    with emulating(arch=80, detect_races="rw") as backward:
        dwconv_gluon(
            du, weight, None, dy, dtype=BF16, out_dtype=BF16, flip=True, statistics=False, config=_whole(shape)
        )
    assert backward.launches[0].thread_instructions <= budget * u.numel()


@needs_gluon
@pytest.mark.parametrize("channels", [pytest.param(64, marks=thorough), 48])
def test_a_residual_in_float32_moves_in_whole_sectors(emulating, channels):
    """As under autocast; a program has 16 of the 48 channels."""
    shape = (8, 14, 14, channels)
    with emulating(arch=80, detect_races="rw") as emulation:
        check_data_gradient(shape, 7, BF16, torch.float32)
    assert len(emulation.launches) == 2
    for launch in emulation.launches:
        moved = launch.traffic()
        stores = [name for name in moved if name.startswith("STG")]
        assert stores
        assert {moved[name].efficiency for name in ("LDGSTS.128", *stores)} == {1}


@needs_gluon
@pytest.mark.parametrize(
    ("shape", "taps", "dtype", "stream", "segment"),
    [
        ((1, 14, 14, 40), 7, BF16, None, 8),
        ((2, 9, 17, 96), 5, torch.float16, torch.float32, 6),
        pytest.param((3, 13, 9, 64), 7, BF16, torch.float32, 13, marks=thorough),
        ((1, 2, 3, 8), 3, torch.float16, None, 2),
    ],
)
def test_explicit_layouts_for_any_height_width_and_segment(emulating, shape, taps, dtype, stream, segment):
    x, weight, bias, _, _ = draw(shape, taps, dtype, stream)
    config = GluonConfig(segment, 2 if stream == torch.float32 else 4)
    with emulating(arch=80, detect_races="rw"):
        u, stats = dwconv_gluon(
            x, weight, bias, None, dtype=dtype, out_dtype=dtype, flip=False, statistics=True, config=config
        )
    reference = dwconv_reference(x.double(), weight.double(), bias.double())
    assert_as_good_as_eager(u, dwconv_reference(x.to(dtype), weight, bias), reference)
    check_statistics(stats, u, dtype)


def test_portable_tensor_core_form(emulating):
    shape = (4, 28, 28, 32)
    x, weight, bias, _, _ = draw(shape, 7, BF16)
    with emulating(arch=80, detect_races="rw") as forward:
        u, stats = dwconv_tensor_core(
            x, weight, bias, None, dtype=BF16, out_dtype=BF16, flip=False, statistics=True,
            config=TensorCoreConfig(8, 16, 28, 8),
        )  # fmt: skip
    reference = dwconv_reference(x.double(), weight.double(), bias.double())
    assert_as_good_as_eager(u, dwconv_reference(x, weight, bias), reference)
    check_statistics(stats, u, BF16)
    assert forward.launches[0].thread_instructions <= 40 * u.numel()


@pytest.mark.parametrize(
    "shape",
    [pytest.param((4, 28, 28, 64), marks=thorough), (8, 14, 14, 96), pytest.param((16, 7, 7, 64), marks=thorough)],
)
def test_forward_in_float32(emulating, shape):
    x, weight, bias, _, _ = draw(shape, 7, torch.float32)
    with emulating(arch=80, detect_races="rw") as forward:
        u, _ = dwconv_scalar(x, weight, bias, None, out_dtype=torch.float32, flip=False, statistics=True)
    assert forward.launches[0].thread_instructions <= 100 * u.numel()


@needs_gluon
@pytest.mark.parametrize(
    ("shape", "channels", "budget"),
    [
        pytest.param((14, 56, 56, 32), 96, 14, marks=thorough),
        pytest.param((8, 28, 28, 32), 192, 14, marks=thorough),
        ((16, 14, 14, 32), 384, 14),
        ((32, 7, 7, 32), 768, 30),
    ],
)
def test_weight_gradient_in_bfloat16(emulating, shape, channels, budget):
    """As many (image, tile) pairs per program as with 128 images of the models' widths, reduction included."""
    x, _, _, du, _ = draw(shape, 7, BF16)
    config = gluon_wgrad_config((128, *shape[1:3], channels), 2, "sm_80")
    with emulating(arch=80, detect_races="rw") as emulation:
        partials = dwconv_wgrad_gluon(x, du, 7, config)
        add_partials(partials, torch.float32)
    assert sum(launch.thread_instructions for launch in emulation.launches) <= budget * x.numel()
    launch = emulation.launches[0]
    assert launch.unique_bytes_read == x.nbytes + du.nbytes
    copies = launch.traffic()["LDGSTS.128"]
    assert copies.efficiency == 1  # whole sectors
    assert launch.static_spills == 0
    programs = partials.shape[0] * config.num_warps
    steps = config.split // 16 * (cdiv(shape[1], config.unroll) * config.unroll + 3 + 1)
    assert launch.by_class()["barrier"] <= programs * (steps + 1)


def test_portable_weight_gradient(emulating):
    x, _, _, du, _ = draw((32, 28, 28, 16), 7, BF16)
    with emulating(arch=80, detect_races="rw") as emulation:
        dwconv_wgrad(x, du, 7, WgradConfig(8, 8, 128, 1, 8))
    assert sum(launch.thread_instructions for launch in emulation.launches) <= 24 * x.numel()
