"""What stands for a tensor in a recording: views as PyTorch makes them, and a kernel for each kind of launch."""

from types import SimpleNamespace

import pytest
import torch
from convnext_fast.kernels import launching, recorded_tensor, recording
from convnext_fast.kernels.recording import record
from plan_support import WEIGHT, Kernel, X, launched, scaled

DENSE, TURNED = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8).permute(0, 3, 1, 2)
FLAT, CUT = torch.randn(2, 1, 1, 8).permute(0, 3, 1, 2), torch.randn(4, 6, 8, 8)[1:3, ::2, 1:5]
VIEWS = {
    "view": lambda x: x.view(x.shape),
    "view of rows": lambda x: x.view(-1, x.shape[-1]),
    "view by numbers": lambda x: x.view(2, -1),
    "view in a tuple": lambda x: x.view((-1, 8)),
    "view of bits": lambda x: x.view(torch.int32),
    "index": lambda x: x[1],
    "index from the end": lambda x: x[-1],
    "slice": lambda x: x[1:, 2],
    "unpacked": lambda x: list(x)[1],
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2)[1],
    "contiguous": lambda x: x.contiguous(),
    "same dtype": lambda x: x.to(torch.float32),
    "torch's function": lambda x: torch.flatten(x, 1),
    "as_strided": lambda x: x.as_strided((2, 2), (4, 1), x.storage_offset() + 3),
}


@pytest.fixture
def _nan_poisoned_allocations():
    """Its functions would replace PyTorch's, which recordings know."""


def seen_by(function, *args):
    """What ``function`` returns in a recording."""
    found = []
    record(lambda *given: found.append(function(*given)), args)
    return found[0] if found else None


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("x", [DENSE, TURNED, FLAT, CUT], ids=["dense", "turned", "flat", "cut"])
def test_views_are_those_of_torch(x, view, monkeypatch):
    """If PyTorch has to copy, or refuses, nothing is recorded, except for `contiguous`, which launches a kernel."""
    if view is VIEWS["contiguous"] and not x.is_contiguous():
        copies = []
        monkeypatch.setattr(recorded_tensor, "copy", lambda *pair: copies.append(pair))
        got = seen_by(view, x)
        assert (got.shape, got.stride(), got.dtype, got.place) == (x.shape, view(x).stride(), x.dtype, (1, 0))
        assert [(source.place, target) for source, target in copies] == [((0, 0), got)]
        return
    try:
        expected = view(x)
    except RuntimeError:
        expected = None
    got = seen_by(view, x)
    if expected is None or expected.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        assert got is None
        return
    assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert got.place == (0, expected.data_ptr() - x.data_ptr())
    assert got.data_ptr() % 16 == expected.data_ptr() % 16
    assert got.is_contiguous() == expected.is_contiguous()


@pytest.mark.parametrize("x", [DENSE, TURNED, FLAT, CUT], ids=["dense", "turned", "flat", "cut"])
@pytest.mark.parametrize(
    "allocate",
    [
        torch.empty_like,
        lambda x: torch.empty_like(x, dtype=torch.float16),
        lambda x: x.new_empty(x.shape[:2], dtype=torch.int32),
        lambda x: torch.empty(x.numel(), len(x), dtype=x.dtype),
        lambda x: torch.empty(x.dim()),
        lambda x: torch.empty_strided((2, 3), (1, 2), dtype=x.dtype, device=x.device),
    ],
)
def test_allocations_are_those_of_torch(x, allocate):
    expected, got = allocate(x), seen_by(allocate, x)
    assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert got.place == (1, 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.zero_(),
        lambda x: x.view(-1).fill_(1.0),
        lambda x: x.copy_(torch.empty_like(x)),
        lambda x: torch.nn.init.zeros_(x),
        lambda x: x.clone(),
        lambda x: x + 1,
        lambda x: x.sum(),
        lambda x: x.tolist(),
        lambda x: float(x[0, 0]),
        lambda x: bool((x > 0).all()),
        lambda x: 2 - x,
        lambda x: x @ x.t(),
        lambda x: int(bool(x[0, 0])),
        lambda x: x == x,
        lambda x: x in [x[0]],
        lambda x: x.__setitem__(0, 1.0),
        lambda x: x.to(torch.float64),
        lambda x: x.expand(2, 2, 2, 8, 4).contiguous(),
        lambda x: torch.zeros(8),
        lambda x: torch.cat((x, x)),
        lambda x: WEIGHT.view(2, 3),
        lambda x: torch.Tensor.data_ptr(x),
        lambda x: x.T,
        lambda x: x.no_such_method(),
        lambda x: torch.empty(0),
        lambda x: torch.empty(3, device="meta"),
        lambda x: torch.empty_strided((3,), (1,), device="meta"),
        lambda x: x.requires_grad_(),
        lambda x: setattr(x, "data", x),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_more_than_a_view_is_not_recorded(function, inference):
    before = X.clone()

    def call(x):
        function(x)
        launched(Kernel(), (1,), x, 1, 1.0, 0, y := torch.empty_like(x))
        return y

    with torch.inference_mode(inference):
        assert record(call, (X,)) is None
        function = len
        assert record(call, (X,)) is not None
    assert torch.equal(X, before)


def test_a_mistake_in_a_recorded_call_warns():
    with pytest.warns(RuntimeWarning, match="calls of dim are not recorded, which is slow: TypeError"):
        assert record(torch.Tensor.dim, (X, X)) is None


def test_an_unknown_tensor_is_not_recorded():
    def call(x):
        launched(Kernel(), (1,), x, 1, 1.0, 0, WEIGHT)
        return torch.empty_like(x)

    assert record(call, (X,)) is None


def test_tensors_that_share_memory_are_known_by_their_places(device):
    plan, other = record(scaled(Kernel()), (X, X)), record(scaled(Kernel()), (X, X.clone()))
    assert [launch.parameters for launch in plan.launches] == [launch.parameters for launch in other.launches]


class Jit:
    """Stands for a ``triton.jit`` function of (pointer, number, pointer or None), and counts what it compiles."""

    params = range(4)

    def __init__(self):
        self.compiled = []

    def run(self, *args, grid, warmup, **meta):
        assert warmup
        self.compiled.append(Kernel())
        return self.compiled[-1]


class Driver:
    """Stands for Triton's."""

    def __init__(self, device):
        self.device = device

    def get_current_device(self):
        return self.device


LAUNCHES = {
    "the same": ((X, 5, None), {"BLOCK": 16}, None),
    "a number like it": ((X, 7, None), {"BLOCK": 16}, None),
    "a float": ((X, 5.0, None), {"BLOCK": 16}, "float"),
    "another float": ((X, 0.25, None), {"BLOCK": 16}, "float"),
    "one": ((X, 1, None), {"BLOCK": 16}, "one"),
    "divided by 16": ((X, 32, None), {"BLOCK": 16}, "16"),
    "also": ((X, 48, None), {"BLOCK": 16}, "16"),
    "of 64 bits": ((X, 2**31 + 1, None), {"BLOCK": 16}, "64"),
    "negative of 64 bits": ((X, -(2**40) - 1, None), {"BLOCK": 16}, "64"),
    "unsigned": ((X, 2**63 + 1, None), {"BLOCK": 16}, "unsigned"),
    "another constant": ((X, 5, None), {"BLOCK": 32}, "constant"),
    "another name": ((X, 5, None), {"num_warps": 16}, "name"),
    "another dtype": ((X.half(), 5, None), {"BLOCK": 16}, "dtype"),
    "alignment": ((torch.empty(9)[1:], 5, None), {"BLOCK": 16}, "alignment"),
    "a pointer": ((X, 5, X), {"BLOCK": 16}, "pointer"),
}


def test_a_kernel_is_found_by_all_that_it_is_compiled_for(monkeypatch):
    driver = SimpleNamespace(active=Driver(0))
    monkeypatch.setattr(recording, "driver", driver)
    kernel, found = Jit(), {}

    def call(args, meta, kernel=kernel):
        def function(x, *rest):
            launching.launch(kernel, (1,), x, *rest, **meta)
            return torch.empty_like(x)

        return record(function, args).launches[0].kernel

    for args, meta, name in LAUNCHES.values():
        assert call(args, meta) is found.setdefault(name, call(args, meta))
    assert len({*map(id, found.values())}) == len(found) == len(kernel.compiled)
    assert call(*LAUNCHES["the same"][:2], Jit()) not in kernel.compiled
    driver.active.device = 1  # another device, whose kernels are loaded there
    assert call(*LAUNCHES["the same"][:2]) is kernel.compiled[-1]
    assert len(kernel.compiled) == len(found) + 1
