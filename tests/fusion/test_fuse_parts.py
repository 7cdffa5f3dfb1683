"""Modules that call several fused modules ("parts") and do other things: one run computes the parts' outputs ahead."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fuse_support import one_thread  # noqa: F401
from support import FLOAT32_BOUND, no_worse, randomise, relative_error
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import ConvNextConfig
from transformers.models.convnext.modeling_convnext import ConvNextLayer, ConvNextLayerNorm

from convnext_fast import fuse, unfuse
from convnext_fast.backends.cpu import llvm
from convnext_fast.models.ahead import AHEAD, computed_ahead

pytestmark = pytest.mark.skipif(llvm.machine_for() is None, reason="needs the kernels for x86 CPUs")


def stage(channels, count):
    return nn.Sequential(*(ConvNextLayer(ConvNextConfig(), channels) for _ in range(count)))


class Body(nn.Module):
    """Parts with something of its own after them, and, by ``between``, between them."""

    between = None

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), ConvNextLayerNorm(16, data_format="channels_first"))
        self.inner = nn.Sequential(stage(16, 2), nn.Dropout(0.5))
        self.last = stage(16, 1)

    def forward(self, x, mask=None):
        y = self.inner[0](self.stem(x))
        if mask is not None:
            y.mul_(mask)
        if self.between == "value":
            y = 2 * y
        elif self.between == "in place":
            y.mul_(2)
        return self.last(y).mean((2, 3))


class Drawing(Body):
    def forward(self, x):
        return self.last(self.inner(self.stem(x))).mean((2, 3))


class InPlace(Body):
    between = "in place"


class InAnotherOrder(Body):
    def forward(self, x):
        return self.inner[0](self.last(self.stem(x))).mean((2, 3))


class Twice(Body):
    def forward(self, x):
        y = self.last(self.inner[0](self.stem(x)))
        return self.last(y).mean((2, 3))


class OnlySome(Body):
    def forward(self, x):
        return self.inner[0](self.stem(x)).mean((2, 3))


class InTraining(Body):
    def forward(self, x):
        y = self.inner[0](self.stem(x))
        return self.last(2 * y if self.training else y).mean((2, 3))


def host(kind=Body):
    return randomise(nn.Sequential(kind(), nn.Linear(16, 5)), seed=1).eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def runs(monkeypatch):
    """How many kernels ran in each run of more than one."""
    found, run = [], llvm.run
    monkeypatch.setattr(llvm, "run", lambda kernels, *rest: found.append(len(kernels)) or run(kernels, *rest))
    return found


@torch.no_grad()
def check(model, image, *rest):
    """The error against float64 is no worse than that of the host's own forward."""
    plain = copy.deepcopy(model)
    unfuse(plain)
    got, eager = (head(body(image, *rest)) for body, head in (model, plain))
    body, head = plain.double()
    assert no_worse(got, head(body(image.double(), *(each.double() for each in rest))), eager)


def test_the_parts_are_one_run(image, runs):
    model = host()
    fuse(model).freeze()
    check(model, image)
    assert runs == [4]


@pytest.mark.parametrize("kind", [Drawing, InPlace, InAnotherOrder, Twice, OnlySome, InTraining])
def test_a_body_that_does_more_between_its_parts_is_left_as_it_is(kind, image):
    model = host(kind)
    fuse(model).freeze()
    assert type(model[0]) is kind
    check(model, image)


@pytest.mark.parametrize("between", ["value", "in place"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_body_that_does_more_later(between, mode, image):
    """An output computed ahead is used only for the same tensor that it was computed from."""
    model = host()
    fuse(model).freeze()
    check(model, image)
    model[0].between = between
    with mode():
        check(model, image)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_another_tensor_among_the_arguments(mode, image):
    model = host()
    fuse(model).freeze()
    with mode():
        check(model, image, torch.rand(2, 16, 6, 4))


def test_an_input_made_in_inference_mode(image):
    model = host()
    fuse(model).freeze()
    with torch.inference_mode():
        check(model, image.clone())


def test_the_input_by_name_in_any_place(image, runs):
    model = host()
    fuse(model).freeze()
    with torch.no_grad():
        expected = model[0](image)
        assert torch.equal(model[0](mask=None, x=image), expected)
    assert runs == [4, 4]


def test_hooks_between_the_body_and_its_parts(image):
    model = host(Nested)
    fuse(model).freeze()
    check(model, image)
    model[0].body.register_forward_hook(lambda module, args, y: y.mul_(3))
    with torch.inference_mode():
        check(model, image)


class Nested(nn.Module):
    """A module with a part in it, then a part."""

    def __init__(self):
        super().__init__()
        self.body = WithNothingElse()
        self.last = stage(16, 1)

    def forward(self, x):
        return self.last(self.body(x)).mean((2, 3))


class WithNothingElse(nn.Module):
    """Not a chain, because it takes an option."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), ConvNextLayerNorm(16, data_format="channels_first"))

    def forward(self, x, option=None):
        return self.stem(x)


def test_hooks_on_parts(image):
    model = host()
    fuse(model).freeze()
    check(model, image)
    for part in (model[0].stem, model[0].inner[0], model[0].last):
        handle = part.register_forward_hook(lambda module, args, y: 2 * y)
        check(model, image)
        handle.remove()


def test_a_replaced_part(image):
    model = host()
    fuse(model).freeze()
    check(model, image)
    model[0].last = nn.Identity()
    check(model, image)


def test_changed_weights(image):
    model = host()
    fuse(model).freeze()
    check(model, image)
    with torch.no_grad():
        model[0].last[0].pwconv1.weight.mul_(2)
    check(model, image)


def test_threads(image):
    model = host()
    fuse(model).freeze()
    images = [image + i for i in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in images]

        def run(x):
            with torch.no_grad():
                return model(x)

        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(run, images * 4))
    assert all(map(torch.equal, got, expected * 4))


def test_copies_pickles_and_signatures(image):
    model = host()
    fuse(model).freeze()
    with torch.no_grad():
        expected = model(image)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other[0]) is type(model[0])
            assert torch.equal(other(image), expected)
    assert inspect.signature(model[0].forward) == inspect.signature(Body().forward)
    unfuse(model)
    assert type(model[0]) is Body
    assert not [name for name in vars(model[0]) if "convnext_fast" in name]


def test_bad_input():
    model = host()
    fuse(model).freeze()
    with torch.no_grad(), pytest.raises(ValueError, match="the patch weight has shape"):
        model(torch.randn(2, 4, 16, 16))
    with torch.no_grad(), pytest.raises(TypeError):
        model[0]()


def test_modes_between_the_body_and_its_parts(image):
    """A part called under hooks on saved tensors, or in another mode, is computed in its own call."""
    saved = []
    model = host()
    fuse(model).freeze()
    body = model[0]
    x = image.clone().requires_grad_()
    for known, how in ((True, contextlib.nullcontext()), (False, saved_tensors_hooks(saved.append, torch.neg))):
        with computed_ahead(body, x), how:
            assert (AHEAD.output(body.stem, x) is not None) is known
    for mode in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with computed_ahead(body, x), mode:
            assert AHEAD.output(body.stem, x) is None
    assert not AHEAD.known


class ByData(Body):
    """Writes through ``data``, which no version counts."""

    def forward(self, x):
        y = self.inner[0](self.stem(x))
        y.data.mul_(2)
        return self.last(y).mean((2, 3))


class Leaf(Body):
    def forward(self, x):
        return self.last(self.inner[0](self.stem(x)).requires_grad_()).mean((2, 3))


class Checkpointing(Body):
    reentrant = False

    def forward(self, x):
        y = checkpoint(self.inner[0], self.stem(x), use_reentrant=self.reentrant)
        return self.last(y).mean((2, 3))


class Reentrant(Checkpointing):
    reentrant = True


@pytest.mark.parametrize("kind", [ByData, Checkpointing, Reentrant])
@pytest.mark.filterwarnings("ignore")
def test_a_body_that_touches_a_map_or_checkpoints_a_part_is_left_as_it_is(kind, image):
    model = host(kind)
    fuse(model).freeze()
    assert type(model[0]) is kind
    check(model, image)


def test_gradients_to_a_map_between_the_parts(image):
    """As for Grad-CAM: the model needs no gradient, a map in it does."""
    model = host(Nested)
    model.requires_grad_(False)
    plain = copy.deepcopy(model)
    fuse(model).freeze()
    grads = []
    for each in (plain, model):
        maps = []
        each[0].body.register_forward_hook(lambda module, args, y, maps=maps: maps.append(y.requires_grad_()))
        each(image).square().sum().backward()
        grads.append(maps[0].grad)
    assert relative_error(grads[1], grads[0]) <= FLOAT32_BOUND


def test_a_body_that_makes_a_map_require_gradients(image):
    model = host(Leaf).requires_grad_(False)
    plain = copy.deepcopy(model)
    fuse(model).freeze()
    assert plain(image).requires_grad
    assert model(image).requires_grad


def test_after_a_miss_later_outputs_are_released(image):
    model = host()
    fuse(model).freeze()
    body, x = model[0], image.clone()
    with torch.no_grad(), computed_ahead(body, x):
        assert len(AHEAD.known) == 3
        assert AHEAD.output(body.stem, x.clone()) is None
        assert not AHEAD.known
