"""The target that is used for a device, and which devices the kernels support."""

import pytest
import torch
from convnext_fast.kernels import targets

from convnext_fast.backends import choose


@pytest.fixture
def _gpu(monkeypatch, request):
    for cached in (targets._target_of_cuda, choose._is_old):
        cached.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield
    for cached in (targets._target_of_cuda, choose._is_old):
        cached.cache_clear()


SERVED = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 9): "sm_86",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (12, 0): "sm_120",
    (12, 1): "sm_120",
}


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(("_gpu", "target"), SERVED.items(), indirect=["_gpu"])
def test_unknown_devices_take_the_nearest_older_target(target):
    assert targets._target_of_cuda(0) == target
    assert choose.select(torch.device("cuda", 0), torch.bfloat16) == "triton"


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("_gpu", [(7, 5), (7, 0)], indirect=True)
def test_older_devices_run_the_reference():
    assert choose.select(torch.device("cuda", 0), torch.float16) == "reference"
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0, cuda:0 has 7"):
        targets._target_of_cuda(0)
