"""Calls that replay a plan: the bits of a call without replay, and no plan for calls that it does not fit.

Plans in C launch through a stand-in for CUDA's driver, which executes the launches in the emulator.
Replayed launches have addresses instead of tensors, which the emulator does not take. ``Memory`` gives it tensors
again, and fills the allocations of a call with NaN, so that memory that is read before it is written shows.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from convnext_fast.kernels import native_plan, recording, replaying
from convnext_fast.kernels.weights import BlockWeights, FrozenBlock, Saved
from native_support import StandIn, values_of
from operator_cases import KERNELS_ALONE, ON_CPU, cases
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from convnext_fast.backends import dwconv, environment, gpu
from convnext_fast.ops import block_group_operator
from convnext_fast.ops.compute import as_one_plan
from convnext_fast.ops.signatures import SIGNATURES

ALL = [*ON_CPU, *KERNELS_ALONE]


@pytest.fixture
def _nan_poisoned_allocations():
    """``Memory`` fills allocations."""


class Memory(TorchDispatchMode):
    """All allocations in this context, full of NaN, by address."""

    def __init__(self):
        super().__init__()
        self.known = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return self.poisoned(out) if func.__name__.startswith(("empty", "new_empty")) else out

    def poisoned(self, new):
        self.add(new.untyped_storage())
        torch.empty(0, dtype=torch.uint8).set_(new.untyped_storage()).fill_(255)
        return new

    def allocate(self, shape, strides, dtype):
        """What a plan in C calls: no mode sees it."""
        return self.poisoned(torch.empty_strided(shape, strides, dtype=dtype))

    def add(self, storage):
        self.known.append(storage)

    def tensor(self, address):
        """Bytes from ``address`` to the end of its storage; of the newest one, if an older one was freed."""
        for storage in reversed(self.known):
            offset = address - storage.data_ptr()
            if 0 <= offset < storage.nbytes():
                with _disable_current_modes():  # a call that is recorded does not do this
                    new = torch.empty(0, dtype=torch.uint8)
                    return new.set_(storage, offset, (storage.nbytes() - offset,), (1,))
        raise AssertionError(f"a kernel was given the address {address:#x}, which is no tensor's")


class Kernels:
    """Compiled kernels by a number, which C uses as their handle."""

    def __init__(self):
        self.known = []

    def number(self, kernel):
        self.known.append(kernel)
        return len(self.known)

    def launch(self, number, grid, threads, shared, stream, parameters):
        kernel = self.known[number - 1]
        assert (threads, shared) == (32 * kernel.metadata.num_warps, kernel.metadata.shared)
        values = values_of(kernel, parameters)
        kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)


@pytest.fixture(params=["native"])
def repeating(request, emulating, monkeypatch):
    """``call(operator's name or a replayed function, arguments)``, to replay calls, which counts ``call.repeats``.

    Its parameter: "native" for plans that C replays, "python" for plans that Python replays.
    """
    from sass_emulator import emulation

    native = request.param == "native"
    memory, kernels, run = Memory(), Kernels(), emulation.run

    def with_tensors(kernel, grid, values, **options):
        types = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
        found = [
            memory.tensor(value) if isinstance(value, int) and str(kind).startswith("*") else value
            for value, kind in zip(values, types, strict=True)
        ]
        return run(kernel, grid, found, **options)

    def counted(plans, arguments):
        results = module.repeat(plans, arguments)
        call.repeats += results is not NotImplemented
        return results

    def call(name, arguments):
        for value in tensors(arguments):
            memory.add(value.untyped_storage())
        if native:
            return function_of(name)(*arguments)
        before = repeat.call_count
        with memory:
            results = function_of(name)(*arguments)
        call.repeats += repeat.call_count - before
        return results

    call.repeats, call.add = 0, memory.add
    if native:
        module = native_plan.library()
        if module is None:
            pytest.skip("needs a C compiler")
        stand_in = StandIn(kernels.launch, memory.allocate, kernels.number)
        monkeypatch.setattr(native_plan, "cuda", lambda: stand_in.driver)
        watched = SimpleNamespace(**(vars(module) | {"repeat": counted}))
        monkeypatch.setattr(native_plan, "library", lambda: watched)
    else:
        monkeypatch.setattr(native_plan, "build", lambda plan: None)
    monkeypatch.setattr(emulation, "run", with_tensors)
    monkeypatch.setattr(environment, "REQUEST", "triton")
    monkeypatch.setattr(replaying, "is_replayable", lambda tensor: True)
    for function in (gpu.blocks_fwd, gpu.blocks_bwd):
        monkeypatch.setattr(function.calls, "wait", 0)
    forget()
    with (
        emulating(arch=80),
        mock.patch.object(recording.Plan, "repeat", autospec=True, side_effect=recording.Plan.repeat) as repeat,
    ):
        yield call
    forget()


GRAPHS = as_one_plan(block_group_operator._blocks_fwd), as_one_plan(block_group_operator._blocks_bwd)
REPLAYED = (*ALL, "dwconv", gpu.blocks_fwd, gpu.blocks_bwd, gpu.steps, *GRAPHS)


def forget():
    for name in REPLAYED:
        calls_of(name).forget()


def calls_of(name):
    if callable(name):
        return name.calls
    return (dwconv._launch if name == "dwconv" else getattr(gpu, name)).calls


def tensors(arguments):
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    nested = arguments if isinstance(arguments, (list, tuple)) else ()
    return [tensor for value in nested for tensor in tensors(value)]


def present(values):
    return [value for value in values if value is not None]


def scaled(value, factor):
    """Arguments with tensors of other values in other memory."""
    if isinstance(value, torch.Tensor):
        return value.detach() * factor
    return type(value)(scaled(each, factor) for each in value) if isinstance(value, (list, tuple)) else value


def function_of(name):
    """The function of flat arguments, in which an empty vector means an absent one, as in an operator."""
    if callable(name):
        return name
    if name == "dwconv":
        return dwconv._launch
    function, signature = getattr(gpu, name), SIGNATURES[name]

    def is_absent(value):
        return isinstance(value, torch.Tensor) and value.shape == (0,)

    return lambda *flat: function(*signature.group([None if is_absent(value) else value for value in flat]))


def as_written(name, arguments):
    """The function without replay, also of the calls in it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(replaying, "is_replayable", return_value=False))
        for each in {calls_of(name), *map(calls_of, REPLAYED)}:
            stack.enter_context(mock.patch.object(each, "repeat", None))
        return function_of(name)(*arguments)


def assert_same_bits(results, expected):
    single = isinstance(expected, torch.Tensor)
    for got, want in zip(*(([each] if single else each) for each in (results, expected)), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
            assert torch.isfinite(want).all()
            assert torch.equal(got, want)


# Their cases have pixels that no patch covers, whose gradients are filled with zeros.
DO_MORE = ("downsample_bwd", "patchify_stem_bwd")
IN_TIME = ("block_bwd", "frozen_block_fwd", "patchify_stem_fwd")


@pytest.mark.parametrize(
    ("repeating", "name", "dtype", "every"),
    [
        *(("native", name, torch.bfloat16, False) for name in IN_TIME if not name.endswith("bwd")),
        ("python", "frozen_block_fwd", torch.bfloat16, False),
        *(pytest.param("native", name, torch.bfloat16, True, marks=pytest.mark.thorough) for name in ALL),
        *(pytest.param("native", name, torch.float32, True, marks=pytest.mark.exhaustive) for name in ALL),
        *(pytest.param("python", name, torch.bfloat16, True, marks=pytest.mark.exhaustive) for name in IN_TIME),
    ],
    indirect=["repeating"],
)
def test_repeats_bit_for_bit(repeating, name, dtype, every):
    torch.manual_seed(0)
    with mock.patch.object(replaying, "is_replayable", return_value=False):  # for the forward calls behind them
        given = cases(name, dtype)
    for arguments in given if every else given[-1:]:
        repeating.repeats = 0
        repeating(name, scaled(arguments, 1.0))
        other = scaled(arguments, 0.5)
        assert_same_bits(repeating(name, other), as_written(name, other))
        assert repeating.repeats == (0 if name in DO_MORE else 2)


def stem(alignment=0, side=8, dtype=torch.float32):
    """Arguments of a small stem; ``alignment``: bytes between its image and an aligned address."""
    skipped = alignment // dtype.itemsize
    image = torch.randn(3 * side * side + skipped).to(dtype)[skipped:].view(1, 3, side, side)
    weight = torch.randn(8, 3, 4, 4).to(dtype)
    return image, weight, *torch.randn(3, 8).to(dtype), 1e-6, dtype, dtype


def test_patches_that_cover_the_image_are_recorded(repeating):
    torch.manual_seed(0)
    *stem_arguments, eps, dtype, _ = stem()
    x, affine, bias = torch.randn(1, 4, 4, 8), torch.randn(2, 8), torch.randn(12)
    weight = torch.randn(12, 8, 2, 2)
    packed = weight.contiguous(memory_format=torch.channels_last)
    calls = {
        "patchify_stem_bwd": (torch.randn(1, 2, 2, 8), *stem_arguments, eps, dtype, True),
        "downsample_bwd": (torch.randn(1, 2, 2, 12), x, *affine, weight, bias, eps, dtype, True, True, True),
        "frozen_downsample_fwd": (x, packed, bias, eps, dtype),
    }
    for number, (name, given) in enumerate(calls.items(), 1):
        for factor in (1.0, 0.5):
            other = scaled(given, factor)
            assert_same_bits(repeating(name, other), as_written(name, other))
        assert repeating.repeats == 2 * number


def test_blocks_one_after_another_are_one_plan(repeating):
    """Their activations and scratch buffers share memory."""
    torch.manual_seed(0)
    x, *weights, eps, act, dtype = cases("frozen_block_fwd", torch.bfloat16)[0]

    @replaying.replayed
    def chain(x, blocks):
        for block in blocks:
            x = gpu.frozen_block_fwd(x, FrozenBlock(*block), eps, act, dtype)
        return x

    for factor in (1.0, 0.5):
        given = scaled((x, (tuple(weights), scaled(tuple(weights), 0.9), tuple(weights))), factor)
        given = (given[0], tuple(scaled(block, 1.0) for block in given[1]))  # memory of its own for each
        assert_same_bits(repeating(chain, given), as_written(chain, given))
    assert repeating.repeats == 2
    (plan,) = chain.calls.kinds.values()
    assert len({id(part.plan) for part in plan.launches}) == 1


@pytest.mark.thorough
def test_blocks_of_a_group_are_one_plan(repeating):
    """Forward and backward, and as steps of a model in inference; the second block repeats the first one's plan."""
    torch.manual_seed(0)
    x, *flat = cases("block_fwd", torch.bfloat16)[0]
    drop_scale, eps, act, _, dtype = flat[11:]
    for factor in (1.0, 0.5):
        blocks = tuple(
            (BlockWeights(*scaled(flat[:11], each * factor)), scaled(drop_scale, 1.0), eps, act, 1) for each in (1, 0.9)
        )
        given = scaled(x, factor), blocks, dtype
        forward = repeating(gpu.blocks_fwd, given)
        assert_same_bits(forward, as_written(gpu.blocks_fwd, given))
        inputs, saved = (given[0], forward[4]), (Saved(*forward[:4]), Saved(*forward[5:9]))
        given = torch.randn_like(x), inputs, blocks, saved, ((True, True),) * 2, dtype
        assert_same_bits(repeating(gpu.blocks_bwd, given), as_written(gpu.blocks_bwd, given))
        given = scaled(x, factor), tuple((block[0], eps, act) for block in blocks), (0, 1), dtype
        assert_same_bits(repeating(gpu.steps, given), as_written(gpu.steps, given))
    assert repeating.repeats == 6  # each call as a whole


@pytest.mark.thorough
@pytest.mark.parametrize("needs_first", [True, False])
def test_blocks_of_a_group_in_a_graph_are_one_plan(repeating, needs_first):
    """The gradients of all weights of one dtype are in one tensor. Without ``needs_first`` the first block has none."""
    torch.manual_seed(0)
    x, *flat = cases("block_fwd", torch.bfloat16)[0]
    flat[1], (drop_scale, eps, act, _, dtype) = flat[1].float(), flat[11:]
    for factor in (1.0, 0.5):
        own = [[*scaled(flat[:11], each * factor), scaled(drop_scale, 1.0)] for each in (1, 0.9)]
        masks = (sum(1 << i for i, each in enumerate(own[0]) if each is not None),) * 2
        weights = tuple(each for each in own[0] + own[1] if each is not None)
        options = weights, masks, (eps,) * 2, f"{act},{act}", (1, 1), dtype
        given = scaled(x, factor), *options
        forward = repeating(GRAPHS[0], given)
        blocks = tuple((BlockWeights(*each[:11]), each[11], eps, act, 1) for each in own)
        expected = as_written(gpu.blocks_fwd, (given[0], blocks, dtype))
        assert_same_bits(forward, present(expected))
        half = len(weights) // 2
        dy, needs = torch.randn_like(x), (needs_first,) * (1 + half) + (True,) * half
        found = repeating(GRAPHS[1], (dy, given[0], weights, tuple(forward[:-1]), *options[1:], needs))
        first = 0 if needs_first else 1
        arguments = (
            (given[0], forward[2])[first:],
            blocks[first:],
            (Saved(*forward[:2], None), Saved(*forward[3:5], None)),
        )
        wanted = ((True, True),) * 2 if needs_first else ((False, True),)
        dx, *gradients = as_written(gpu.blocks_bwd, (dy, *arguments[:2], arguments[2][first:], wanted, dtype))
        sizes, places = block_group_operator._layout(weights, masks, needs)
        assert len(found) == needs_first + len(sizes) == needs_first + 2
        memory = dict(zip(sizes, found[needs_first:], strict=True))
        parts = block_group_operator._parts(memory, weights, places)
        assert_same_bits(present(parts), present(gradients))
        assert not needs_first or torch.equal(found[0], dx)
    assert repeating.repeats == 4


def test_what_a_compiled_model_calls(repeating):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 5, 9, 16).bfloat16(), torch.randn(16, 1, 7, 7)
    for factor in (1.0, 0.5):
        given = (*scaled((x, weight), factor), None, None, torch.bfloat16, torch.bfloat16, False, True)
        assert_same_bits(repeating("dwconv", given), as_written("dwconv", given))
    assert repeating.repeats == 2


@pytest.mark.parametrize(
    "other",
    [{"alignment": 4}, {"side": 12}, {"dtype": torch.float16}],
    ids=["alignment", "size", "dtype"],
)
def test_different_calls_have_their_own_records(repeating, other):
    for _ in range(2):
        repeating("patchify_stem_fwd", stem())
    assert repeating.repeats == 2
    for repeats in (3, 4):
        given = stem(**other)
        assert_same_bits(repeating("patchify_stem_fwd", given), as_written("patchify_stem_fwd", given))
        assert repeating.repeats == repeats


def test_tf32_has_its_own_record(repeating):
    given, switch = stem(), torch.backends.cuda.matmul
    exact = [repeating("patchify_stem_fwd", given) for _ in range(2)][1]
    switch.allow_tf32 = True
    try:
        rounded = [repeating("patchify_stem_fwd", given) for _ in range(2)][1]
    finally:
        switch.allow_tf32 = False
    assert repeating.repeats == 4
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_whose_memory_is_not_in_order_are_copied(repeating, dtype):
    """As after ``model.to(memory_format=torch.channels_last)``; for every rank that a weight can have."""
    torch.manual_seed(0)
    image, weight, *affine, eps, _, _ = stem(dtype=dtype)
    x, narrow = torch.randn(1, 4, 4, 8).to(dtype), torch.randn(12, 8, 2, 2).to(dtype)
    norm, bias = torch.randn(2, 16).to(dtype)[:, ::2], torch.randn(12).to(dtype)
    linear = torch.randn(8, 32).to(dtype).t(), torch.randn(64).to(dtype)[::2], torch.randn(32, 8).to(dtype).t()
    last = {"memory_format": torch.channels_last}
    calls = {
        "patchify_stem_fwd": (image, weight.to(**last), *affine, eps, dtype, dtype),
        "patchify_stem_bwd": (torch.randn(1, 2, 2, 8).to(dtype), image, weight.to(**last), *affine, eps, dtype, True),
        "downsample_fwd": (x, *norm, narrow.to(**last), bias, eps, dtype),
        "frozen_downsample_fwd": (x, narrow.transpose(2, 3), bias, eps, dtype),
        "pointwise_mlp_fwd": (x, x, *linear, *affine[:2], None, "relu", 1, dtype),
    }
    for name, given in calls.items():
        for _ in range(2):
            other = tuple(each * 0.5 if isinstance(each, torch.Tensor) else each for each in given)
            assert_same_bits(repeating(name, other), as_written(name, other))
            given = other
    assert repeating.repeats == 2 * len(calls)


def test_a_call_that_does_more_is_not_recorded(repeating):
    """Here it writes zeros where there is no patch."""
    image, *rest, eps, dtype, _ = stem(side=9)
    for _ in range(4):
        given = (torch.randn(1, 2, 2, 8), torch.randn_like(image), *rest, eps, dtype, True)
        assert_same_bits(repeating("patchify_stem_bwd", given), as_written("patchify_stem_bwd", given))
    assert repeating.repeats == 0


def test_writes_into_an_allocation_are_not_lost(repeating):
    """No launch makes them, so a plan would return the allocation unwritten."""
    copied = replaying.replayed(lambda x: torch.empty_like(x).copy_(x))
    for _ in range(4):
        x = torch.randn(5)
        assert torch.equal(copied(x), x)
    assert list(copied.calls.kinds.values()) == [None]


def test_tensors_in_the_same_memory_are_told_apart(repeating):
    """x is its own residual in two calls; in the next it is not, though the tensors look the same."""
    parameters = torch.randn(24, 8), torch.randn(24), torch.randn(8, 24), torch.randn(8), torch.randn(8)
    x = torch.randn(1, 4, 4, 8)
    for residual in (x, x, torch.randn_like(x)):
        given = (x, residual, *parameters, None, "relu", 1, torch.float32)
        assert_same_bits(repeating("pointwise_mlp_fwd", given), as_written("pointwise_mlp_fwd", given))
    assert repeating.repeats == 3


def test_an_empty_batch_is_not_recorded(repeating):
    _, *rest = stem()
    for _ in range(3):
        assert repeating("patchify_stem_fwd", (torch.empty(0, 3, 8, 8), *rest)).shape == (0, 2, 2, 8)
    assert repeating.repeats == 0


def test_records_are_bounded(repeating, monkeypatch):
    monkeypatch.setattr(replaying, "MOST", 2)
    for side in (8, 12, 16, 8, 8):
        repeating("patchify_stem_fwd", stem(side=side))
        assert len(calls_of("patchify_stem_fwd").kinds) <= 2
        assert len(calls_of("patchify_stem_fwd").native) <= 2
    assert repeating.repeats == 5
