"""Every kernel test runs with outputs full of NaN until a kernel writes them."""

import ctypes
import struct
import time

import pytest
from kernel_support import poisoned


@pytest.fixture(autouse=True)
def _nan_poisoned_allocations():
    with poisoned():
        yield


@pytest.fixture
def device(monkeypatch):
    """A stand-in for CUDA's driver; ``device.launches`` are (function, grid, threads, shared, stream, parameters)."""
    from convnext_fast.kernels import native_plan, replaying
    from native_support import StandIn

    if native_plan.library() is None:
        pytest.skip("needs a C compiler")

    def launch(function, grid, threads, shared, stream, parameters):
        if stand_in.fails:
            raise RuntimeError("as a driver that is out of resources")
        time.sleep(stand_in.seconds)
        codes = ("Q", "i", "f", "Q", "Q")
        values = (
            struct.unpack(code, ctypes.string_at(parameters[i], struct.calcsize(code)))[0]
            for i, code in enumerate(codes)
        )
        stand_in.launches.append((function, grid, threads, shared, stream, tuple(values)))

    stand_in = StandIn(launch)
    stand_in.launches, stand_in.fails, stand_in.seconds = [], False, 0
    monkeypatch.setattr(native_plan, "cuda", lambda: stand_in.driver)
    monkeypatch.setattr(replaying, "is_replayable", lambda tensor: True)
    return stand_in
