"""The copy of a tensor whose memory is not in order, with which a call with such a weight is recorded."""

import sys
from pathlib import Path

import pytest
import torch
from convnext_fast.kernels.copying import copy
from convnext_fast.kernels.targets import planned_for

sys.path.append(str(Path(__file__).resolve().parents[4]))  # bench/ is not installed
from bench.static_analysis.compilation import GPU_TARGETS, compile_launch, recording

STRIDED = {
    "permuted": lambda x: x.view(11, 7, 5, 6).permute(3, 2, 1, 0),
    "cut": lambda x: x.view(5, 7, 6, 11)[::2, 1::2, :, 2:],
    "transposed": lambda x: x.view(1155, 2).t(),
    "expanded": lambda x: x[:3].expand(700, 3),
    "every second": lambda x: x[::2],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_element_is_in_its_place(emulating, dtype):
    whole = torch.randn(2310).to(dtype)
    for strided in STRIDED.values():
        x = strided(whole)
        y = torch.empty(x.shape, dtype=dtype)
        with emulating(arch=80, detect_races="rw"):
            copy(x, y)
        assert torch.equal(x, y)


@pytest.mark.parametrize("target", GPU_TARGETS)
def test_it_compiles_for_every_target(target):
    x = torch.empty(768, 384, 2, 2, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    with planned_for(target), recording() as launches:
        copy(x, torch.empty(x.shape, dtype=x.dtype, device="meta"))
    (launch,) = launches
    assert compile_launch(launch, target).spills == 0
