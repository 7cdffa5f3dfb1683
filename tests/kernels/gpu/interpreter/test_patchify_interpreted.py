import pytest
import torch
from convnext_fast.kernels.autotuning import SHARES
from convnext_fast.kernels.mlp.tuning import downsample_config
from convnext_fast.kernels.patchify import bwd, fwd
from patchify_cases import DOWNSAMPLES, STEMS, check_downsample, check_stem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", STEMS, ids=str)
def test_stem(case, dtype):
    check_stem(case, dtype)


def test_stem_of_a_strided_image():
    check_stem((2, 3, 8, 17, 24, 4), torch.float16, strided=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", DOWNSAMPLES, ids=str)
def test_downsample(case, dtype):
    check_downsample(case, dtype)


def test_a_float32_stream_in_float16():
    check_stem(STEMS[0], torch.float16, stream=torch.float32)
    check_downsample(DOWNSAMPLES[0], torch.float16, torch.float32)


@pytest.mark.parametrize(("rows", "stream"), [(1, torch.float16), (1, torch.float32), (100_000, torch.float16)])
def test_downsample_in_tiles_of_sm_90(rows, stream, monkeypatch):
    config = downsample_config(rows, 192, torch.float16, False, "sm_90")
    monkeypatch.setattr(fwd, "downsample_config", lambda *a: config)
    check_downsample((1, 4, 5, 150, 70, 2), torch.float16, stream)


@pytest.mark.parametrize("share", SHARES[1:], ids=str)
def test_every_share_of_the_autotuner(share, monkeypatch):
    monkeypatch.setattr(bwd, "SHARES", (share,))
    check_stem(STEMS[0], torch.float16)
    check_downsample(DOWNSAMPLES[0], torch.float16)
