"""Plans that C does not replay, or refuses: then Python replays them, with a warning where that helps."""

import dataclasses
import threading
import time
import warnings
from unittest import mock

import pytest
import torch
from convnext_fast.kernels import native_plan, replaying
from convnext_fast.kernels.recording import Part, Place, Plan, record
from plan_support import PTX, WEIGHT, Kernel, X, known, launched, scaled


@pytest.fixture
def _nan_poisoned_allocations():
    """Its mode would see every allocation, and calls that a mode sees are not replayed."""


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel(launch_pdl=True),
        Kernel(launch_cooperative_grid=True),
        Kernel(profile_scratch_size=64),
        Kernel(instrumentation_mode="gsan"),
    ],
    ids=lambda kernel: next(name for name in vars(kernel.metadata) if name != "num_ctas"),
)
def test_launches_that_are_more_than_a_kernel_on_a_grid(device, kernel):
    call = known(scaled(kernel), X, WEIGHT)
    with mock.patch.object(Plan, "repeat", autospec=True, return_value="by Python"):
        assert call(X, WEIGHT) == "by Python"


@pytest.mark.parametrize(
    "ptx",
    [
        PTX.replace(".u32", ".u64"),
        PTX.replace(".param .u32 kernel_param_1,", ""),
        PTX.replace(".f32 kernel_param_2", ".align 64 .b8 kernel_param_2[128]"),
        PTX.replace("_param_4", "_param_4,\n.param .u32 kernel_param_5"),
    ],
    ids=["another size", "fewer", "a descriptor", "more that are no pointers"],
)
def test_a_kernel_that_takes_other_parameters(device, ptx):
    """As with an unknown version of Triton: one warning, and Python launches."""
    native_plan._warn.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        calls = [known(scaled(Kernel(ptx=ptx)), X, WEIGHT) for _ in range(2)]
        with mock.patch.object(Plan, "repeat", autospec=True, return_value="by Python"):
            assert [call(X, WEIGHT) for call in calls] == ["by Python"] * 2
    assert len(told) == 1
    assert "takes parameters" in str(told[0].message)


def test_more_tensors_than_c_has_room_for(device):
    """They have no key either, and Python replays without asking for one."""
    weights = tuple(torch.randn(1) for _ in range(1024))
    kernel = Kernel()

    def function(x, weights):
        y = torch.empty_like(x)
        launched(kernel, (1,), x, 1, 1.0, 0, y)
        return y

    native_plan._warn.cache_clear()
    call = known(function, X, weights)
    with (
        mock.patch.object(Plan, "repeat", autospec=True, return_value="by Python"),
        pytest.warns(UserWarning, match="1026 tensors and pieces of memory, C repeats calls with up to 1024"),
    ):
        assert call(X, weights) == "by Python"
    assert native_plan.library().key((X, weights)) is None


def test_without_a_compiler_python_repeats(device, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("Failed to find C compiler")

    native_plan.library.cache_clear()
    native_plan._warn.cache_clear()
    monkeypatch.setattr(native_plan, "compile_module_from_src", fail)
    try:
        with pytest.warns(UserWarning, match=r"Failed to find C compiler.*install a C compiler"):
            calls = [known(scaled(Kernel()), X, WEIGHT) for _ in range(2)]
        with (
            mock.patch.object(Plan, "repeat", autospec=True, return_value="by Python"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            assert [call(X, WEIGHT) for call in calls] == ["by Python"] * 2
    finally:
        native_plan.library.cache_clear()


@pytest.mark.parametrize("offender", ["memory", "piece", "allocation", "places of a part", "device of a part"])
def test_numbers_that_do_not_fit_are_refused(device, offender):
    plan, part = (record(scaled(Kernel()), (X, WEIGHT)) for _ in range(2))
    places = [Place(0, 0)] * 4
    if offender == "memory":
        plan.launches[0].parameters[0] = Place(4, 0)
    elif offender == "piece":
        plan.pieces[0] = 2, 0
    elif offender == "allocation":
        plan.results[0] = plan.results[0]._replace(allocation=2)
    elif offender == "places of a part":
        plan.launches.append(Part(part, places[1:]))
    else:
        plan.launches.append(Part(part, places))
        assert native_plan.build(plan)
        part.device, part.native = 1, native_plan.build(dataclasses.replace(part, device=1))
    with pytest.raises(ValueError, match="do not fit"):
        native_plan.build(plan)


def test_a_recording_takes_no_memory_and_computes_nothing(device):
    made, given = [], []

    def function(x):
        launched(Kernel(), (1,), x, 1, 1.0, 0, y := torch.empty(1 << 36, 2))
        made.append(y.data_ptr())
        return y.sum() if given else y

    assert record(function, (X,)).allocations == [((1 << 36, 2), (2, 1), torch.float32)]
    given.append(X)
    assert record(function, (X,)) is None
    assert made[0] == made[1]


def test_first_calls_of_several_threads_are_made_once(device):
    """The others wait, because Triton compiles in the first call, and then replay the plan."""
    made, together, written = [], threading.Barrier(6), scaled(Kernel())

    def function(x, weight):
        made.append(x)
        time.sleep(0.05)
        return written(x, weight)

    call = replaying.replayed(function)
    threads = [threading.Thread(target=lambda: together.wait() < 6 and call(X, WEIGHT)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(device.launches) == 6 * 3
