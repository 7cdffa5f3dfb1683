"""Plans that C replays: the parameters of its launches, and when it leaves a call to Python.

Nothing is compiled for a GPU here: a stand-in for CUDA's driver records the launches, on CPU tensors.
"""

import gc
import itertools
import struct
import threading
from unittest import mock

import pytest
import torch
from convnext_fast.kernels import replaying
from convnext_fast.kernels.recording import Plan, record
from plan_support import EPS, PTX, WEIGHT, Kernel, X, known, launched, scaled
from triton import knobs


@pytest.fixture
def _nan_poisoned_allocations():
    """Its mode would see every allocation, and calls that a mode sees are not replayed."""


def test_what_is_launched(device):
    """Each parameter in its place, pointers to this call's tensors with their offsets, then null pointers."""
    call = known(scaled(Kernel()), X, WEIGHT)
    x, weight = torch.randn(8, 4), torch.randn(6)
    device.stream = 4711
    y = call(x, weight)
    (scratch,) = {each[-1][3] for each in device.launches[:1]}
    single = struct.unpack("f", struct.pack("f", EPS))[0]
    assert device.launches == [
        (7, (3, 2, 1), 128, 2048, 4711, (x.data_ptr(), 5, single, scratch, 0)),
        (7, (1, 1, 1), 128, 2048, 4711, (weight.data_ptr() + 4, -6, 0.5, scratch + 16, 0)),
        (7, (1, 1, 9), 128, 2048, 4711, (scratch, 7, 2.0, y.data_ptr(), 0)),
    ]
    assert (y.shape, y.stride(), y.dtype, y._base) == ((2, 16), (16, 1), torch.float32, None)


def test_a_tensor_that_moved_is_found_where_it_is(device):
    """The same Python tensor in other memory: `.data`, `set_`, and one freed and allocated again."""
    weight = WEIGHT.clone()
    call = known(scaled(Kernel()), X, weight)
    moves = (
        lambda: setattr(weight, "data", torch.randn(6)),
        lambda: weight.set_(torch.randn(6)),
        lambda: None,
    )
    for move in moves:
        move()
        del device.launches[:]
        call(X, weight)
        assert device.launches[1][-1][0] == weight.data_ptr() + 4


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.t(), w),
        lambda x, w: (x.view(4, 8), w),
        lambda x, w: (torch.empty(8, 8)[:, ::2], w),
        lambda x, w: (x.double(), w),
        lambda x, w: (torch.empty(33)[1:].view(8, 4), w),
        lambda x, w: (x, torch.empty(12)[::2]),
        lambda x, w: (x, w.bfloat16()),
        lambda x, w: (x, w, 1e-5),
    ],
    ids=["transposed", "shape", "stride", "dtype", "alignment", "weight's stride", "weight's dtype", "number"],
)
def test_what_differs_has_a_plan_of_its_own(device, change):
    call = known(scaled(Kernel()), X, WEIGHT)
    for arguments in ((X, WEIGHT), change(X, WEIGHT), (X, WEIGHT)):
        call(*arguments)
    assert len(call.calls.kinds) == len(call.calls.native) == 2
    assert len(device.launches) == 3 * 3


def test_a_weight_changed_in_place_is_noticed(device):
    """Its strides change; its address and the Python tensor do not."""
    weight = torch.randn(6, 6)
    call = known(scaled(Kernel()), X, weight)
    call(X, weight)
    weight.t_()
    call(X, weight)
    assert len(call.calls.kinds) == len(call.calls.native) == 2
    assert device.launches[4][-1][0] == weight.data_ptr() + 4


def test_nested_tuples_are_taken_in_order(device):
    kernel = Kernel()

    def function(x, weights):
        y = torch.empty_like(x)
        launched(kernel, (1,), weights[1][0], 1, 1.0, 0, weights[0])
        launched(kernel, (1,), x, 1, 1.0, 0, y)
        return y, None

    call = known(function, X, (WEIGHT, (WEIGHT.clone(), None)))
    first, second = torch.randn(6), torch.randn(6)
    y, none = call(X, (first, (second, None)))
    assert none is None
    assert [each[-1][:1] + each[-1][3:4] for each in device.launches] == [
        (second.data_ptr(), first.data_ptr()),
        (X.data_ptr(), y.data_ptr()),
    ]


def test_types_may_be_promoted(device):
    def function(x, weight):
        return scaled(Kernel())(x, weight, torch.promote_types(x.dtype, weight.dtype).itemsize * EPS)

    call = known(function, X, WEIGHT)
    call(X, WEIGHT)
    assert len(device.launches) == 3


def test_parts_of_one_allocation(device):
    kernel = Kernel()

    def function(x):
        both = torch.empty(2, 8)
        launched(kernel, (1,), x, 1, 1.0, 0, both[1])
        return both[1], both[0].view(2, 4)

    second, first = known(function, X)(X)
    assert second.data_ptr() == first.data_ptr() + 32 == device.launches[0][-1][3]
    assert (second.shape, first.shape, first.stride()) == ((8,), (2, 4), (4, 1))


def test_parts_of_the_allocation_of_a_part(device):
    """If a call in a recording returns a part of an allocation, the plan around it uses the same part."""
    kernel = Kernel()

    @replaying.replayed
    def halves(x):
        both = torch.empty(2, 8)
        launched(kernel, (1,), x, 1, 1.0, 0, both)
        return both[1], both[0]

    def function(x):
        y = torch.empty(8)
        for half in halves(x):
            launched(kernel, (1,), half, 1, 1.0, 0, y)
        return y

    known(function, X)(X)
    (_, _, _, both, _), *read = (launch[-1] for launch in device.launches)
    assert [each[0] - both for each in read] == [32, 0]


@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty_like,
        lambda x: x.new_empty(x.shape),
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device),
    ],
)
def test_every_way_to_allocate(device, allocate):
    def function(x):
        launched(Kernel(), (1,), x, 1, 1.0, 0, y := allocate(x))
        return y

    call = known(function, X)
    y = call(X)
    assert (y.shape, y.stride(), y.dtype) == (X.shape, X.stride(), X.dtype)
    assert device.launches[0][-1][3] == y.data_ptr()


def test_scratch_memory_is_shared_by_what_is_never_in_use_together():
    kernel = Kernel()

    def chain(x):
        for _ in range(10):
            y = torch.empty(1000)
            launched(kernel, (1,), x, 1, 1.0, 0, y)
            x = y
        return x

    plan = record(chain, (torch.randn(1000),))
    assert [each.shape for each in plan.allocations] == [(4096 + 4000,), (1000,)]
    places = [(launch.parameters[0], launch.parameters[4]) for launch in plan.launches]
    assert all(read != written for read, written in places)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(places))


def test_calls_within_a_recording_are_parts_of_its_plan(device):
    kernel, worked_out = Kernel(), []

    @replaying.replayed
    def step(x):
        worked_out.append(x)
        scratch, y = torch.empty(8), torch.empty_like(x)
        launched(kernel, (1,), x, 1, 1.0, 0, scratch)
        launched(kernel, (1,), scratch, 2, 1.0, 0, y)
        return y

    def chain(x):
        first = step(x)
        return first, step(step(first))

    call = known(chain, X)
    assert len(worked_out) == 1
    assert not device.launches
    first, last = call(X)
    assert len(worked_out) == 1
    ends = [(launch[-1][0], launch[-1][3]) for launch in device.launches]
    assert [number for *_, (_, number, *_) in device.launches] == [1, 2] * 3
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ends))
    assert (ends[0][0], ends[1][1], ends[5][1]) == (X.data_ptr(), first.data_ptr(), last.data_ptr())
    assert all(read != written for read, written in ends)


def test_what_is_composed_is_one_plan_of_the_calls_of_others(device):
    step = replaying.replayed(scaled(Kernel()))
    inner = replaying.composed(lambda x, weight: step(x, weight))
    call = replaying.composed(lambda x, weight: inner(x, weight))
    for times in (1, 2):
        call(X, WEIGHT)
        assert len(call.calls.native) == len(call.calls.kinds) == 1
        assert len(device.launches) == 3 * times
    (plan,) = call.calls.kinds.values()
    assert [part.plan for part in plan.launches] == list(step.calls.kinds.values())
    assert not inner.calls.kinds


def test_a_recording_that_waits(device):
    """Each kind of call counts for itself; calls without a plan launch the same."""
    step = replaying.replayed(scaled(Kernel()))
    call = replaying.composed(lambda x, weight: step(x, weight), wait=2)
    for times, plans in enumerate((0, 0, 1, 1), 1):
        call(X, WEIGHT)
        assert len(call.calls.native) == plans
        assert len(device.launches) == 3 * times
    call(X[:4], WEIGHT)
    assert len(call.calls.native) == 1
    assert len(step.calls.native) == 2


def test_a_part_that_has_no_plan_is_made_as_it_is_written(device):
    copied = replaying.replayed(lambda x: x.clone())

    def function(x):
        launched(Kernel(), (1,), x, 1, 1.0, 0, y := torch.empty_like(x))
        return copied(y), y

    call = known(function, X)
    assert list(call.calls.kinds.values()) == list(copied.calls.kinds.values()) == [None]
    call(X)
    assert not device.launches


def test_scratch_memory_of_a_kernel_is_in_no_place_that_the_call_uses(device):
    """It is the memory that Triton asks for at the launch, the first pointer after the parameters."""
    asking = Kernel(ptx=PTX.replace("_param_4", "_param_4,\n.param .u64 kernel_param_5"), global_scratch_size=128)

    def function(x, weight):
        read = torch.empty(1000, dtype=torch.uint8)
        launched(Kernel(), (1,), x, 5, 1.0, 128, read)
        launched(asking, (4,), read, 5, 1.0, 128, y := torch.empty_like(x))
        return y

    call = known(function, X, WEIGHT)
    call(X, WEIGHT)
    (*_, (_, _, _, read, none)), (*_, (start, _, _, _, scratch)) = device.launches
    assert (start, none) == (read, 0)
    assert scratch
    assert scratch >= read + 1000 or scratch + 4 * 128 <= read


def test_hooks_of_a_profiler_see_every_launch(device):
    """Then Triton's own launcher launches and calls the hooks."""
    call = known(scaled(Kernel()), X, WEIGHT)
    hooks = knobs.runtime.launch_enter_hook
    with mock.patch.object(Plan, "repeat", autospec=True, return_value="by Python") as repeat:
        if hooks is None:  # Triton 3.4
            knobs.runtime.launch_enter_hook = print
        else:
            hooks.add(print)
        try:
            assert call(X, WEIGHT) == "by Python"
        finally:
            if hooks is None:
                knobs.runtime.launch_enter_hook = None
            else:
                hooks.remove(print)
        assert isinstance(call(X, WEIGHT), torch.Tensor)
    assert repeat.call_count == 1


def test_another_current_device_is_left_to_python(device):
    """So is a thread that has no context yet."""
    call = known(scaled(Kernel()), X, WEIGHT)
    call(X, WEIGHT)
    device.device = 3
    with mock.patch.object(Plan, "repeat", autospec=True, return_value="by Python"):
        assert call(X, WEIGHT) == "by Python"
    device.device = -1
    assert isinstance(call(X, WEIGHT), torch.Tensor)


def test_dispatch_modes_see_allocations(device):
    call = known(scaled(Kernel()), X, WEIGHT)
    call(X, WEIGHT)
    with (
        torch.utils._python_dispatch.TorchDispatchMode(),
        mock.patch.object(replaying, "is_replayable", return_value=False),
        mock.patch.object(call.calls, "function", return_value="as written"),
    ):
        assert call(X, WEIGHT) == "as written"


def test_an_error_of_the_driver_is_raised(device, capsys):
    call = known(scaled(Kernel()), X, WEIGHT)
    device.fails = True
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        call(X, WEIGHT)


def test_an_error_of_the_allocator_is_raised(device):
    def allocate(*arguments):
        raise torch.OutOfMemoryError("as a full GPU")

    device.driver = device.driver._replace(allocate=allocate)
    call = known(scaled(Kernel()), X, WEIGHT)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        call(X, WEIGHT)
    assert not device.launches


def test_threads_repeat_one_plan_at_a_time_each_with_its_own_tensors(device):
    call = known(scaled(Kernel()), X, WEIGHT)
    device.seconds = 1e-3  # between the call of the driver and its read of the parameters, others run
    wanted = []

    def work():
        for _ in range(10):
            x, weight = torch.randn(8, 4), torch.randn(6)
            wanted.append((x, weight, call(x, weight)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends = {(each[-1][0], each[-1][3]) for each in device.launches}
    for x, weight, y in wanted:
        assert any((x.data_ptr(), scratch) in ends and (weight.data_ptr() + 4, scratch + 16) in ends and
                   (scratch, y.data_ptr()) in ends for _, scratch in ends)  # fmt: skip
    assert len(device.launches) == 4 * 10 * 3


def test_nothing_leaks(device):
    call = known(scaled(Kernel()), X, WEIGHT)
    call(X, WEIGHT)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        call(X, WEIGHT)
    del device.launches[:]
    gc.collect()
    assert len(gc.get_objects()) - before < 10
