"""`fuse(model).freeze()`: hosts on folded weights, under the rules of this package's own models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fuse_support import fused_calls, one_thread, tensors  # noqa: F401
from support import FLOAT32_BOUND, no_worse, randomise, relative_error
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2Model,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
)
from transformers.models.convnext.modeling_convnext import ConvNextLayer, ConvNextLayerNorm
from weight_changes import LAYER_CHANGES, averages, changes_of

import convnext_fast
from convnext_fast import fuse, unfuse
from convnext_fast.backends import environment
from convnext_fast.backends.cpu import llvm

SHAPE = {"hidden_sizes": [16, 24, 32], "depths": [2, 1, 2], "num_stages": 3, "num_labels": 5}
DINOV3 = {"hidden_sizes": [16, 24, 32, 40], "depths": [2, 1, 1, 1]}


class Listed(nn.Module):
    """A stage that calls a downsampling layer and then a list of blocks."""

    def __init__(self, channels, count):
        super().__init__()
        self.first = nn.Identity()
        self.blocks = nn.ModuleList(block(channels) for _ in range(count))
        self.twice = False

    def forward(self, x):
        x = self.first(x)
        for layer in self.blocks:
            x = layer(x)
        return 2 * x if self.twice else x


class Outside(Listed):
    """Does something of its own between its layers."""

    def forward(self, x):
        return super().forward(x) + 1


class NoisyInTraining(Listed):
    """Does something of its own in training."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Backwards(nn.Module):
    """Calls its modules in another order."""

    def __init__(self):
        super().__init__()
        self.a, self.b = block(16), block(16)

    def forward(self, x):
        return self.a(self.b(x))


def block(channels):
    return ConvNextLayer(ConvNextConfig(), channels)


def norm(channels):
    return ConvNextLayerNorm(channels, data_format="channels_first")


def written():
    """A host made of containers: a stem, stages of every kind, a norm."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 4, 4), norm(16)),
        nn.Sequential(block(16), block(16)),
        nn.Sequential(norm(16), nn.Conv2d(16, 24, 2, 2)),
        Listed(24, 2),
    )


HOSTS = {
    "transformers": lambda: ConvNextForImageClassification(ConvNextConfig(**SHAPE)),
    "transformers, dinov3": lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(**DINOV3)),
    "written": written,
}
RUNS = {"transformers": [8], "transformers, dinov3": [3, 2, 2, 2], "written": [6]}
"""How many steps each run of kernels has."""
FROZEN = {"transformers": 8, "transformers, dinov3": 9, "written": 6}

hosts = pytest.mark.parametrize("name", HOSTS)


def host(name, seed=0):
    return randomise(HOSTS[name](), seed=seed).eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["kernels", "aten"])
def backend(request, monkeypatch):
    """The kernels for CPUs, where there are any, and ATen's calls."""
    if request.param == "aten":
        monkeypatch.setattr(environment, "REQUEST", "aten")


@pytest.fixture
def runs(monkeypatch):
    """How many kernels ran in each run of more than one."""
    if llvm.machine_for() is None:
        pytest.skip("needs the kernels for x86 CPUs")
    found, run = [], llvm.run
    monkeypatch.setattr(llvm, "run", lambda kernels, *rest: found.append(len(kernels)) or run(kernels, *rest))
    return found


@torch.no_grad()
def output(model, x):
    return tensors(model(x))[0]


def check(model, x, got):
    """Against the host's own forward with the same parameters."""
    plain = copy.deepcopy(model)
    unfuse(plain)
    eager = output(plain, x)
    assert no_worse(got, output(plain.double(), x.double()), eager)


@pytest.mark.usefixtures("backend")
@hosts
def test_nothing_but_the_speed_changes(name, image):
    model = host(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    report = fuse(model, strict=True)
    assert report.frozen == ()
    assert report.freeze() is report
    assert set(report.frozen) == {*report.fused, *report.patch_layers}
    assert len(report.frozen) == FROZEN[name]
    check(model, image, output(report, image))
    assert list(model.state_dict()) == list(before)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert report.unfreeze() is report
    assert report.frozen == ()
    check(model, image, output(model, image))
    unfuse(model)
    assert not any("convnext_fast" in key for module in model.modules() for key in vars(module))


@hosts
def test_containers_run_as_one_sequence(name, image, runs):
    model = host(name)
    report = fuse(model)
    output(model, image)
    assert runs == []
    report.freeze()
    got = output(model, image)
    assert runs == RUNS[name]
    assert torch.equal(output(model, image), got)


def test_hooks_fire_and_split_a_sequence(image, runs):
    model = host("written")
    fuse(model).freeze()
    want, seen = output(model, image), []
    handle = model[1][0].register_forward_hook(lambda *_: seen.append("block"))
    runs.clear()
    assert relative_error(output(model, image), want) <= FLOAT32_BOUND
    assert (seen, runs) == (["block"], [2])
    handle.remove()
    model[3].register_forward_pre_hook(lambda *_: seen.append("stage"))
    runs.clear()
    assert relative_error(output(model, image), want) <= FLOAT32_BOUND
    assert (seen, runs) == (["block", "stage"], [2, 2])


def test_a_container_that_changed_runs_its_own_forward(image, runs):
    model = host("written")
    fuse(model).freeze()
    want = output(model, image)
    model[3].twice = True
    assert relative_error(output(model, image), 2 * want) <= FLOAT32_BOUND
    model[3].twice = False
    model[3].blocks.append(nn.Hardtanh(-0.1, 0.1))
    assert output(model, image).abs().max() <= 0.1
    assert runs == [6, 2, 2]
    model[3].blocks = model[3].blocks[:2]
    assert torch.equal(output(model, image), want)


def test_a_setting_of_the_module_that_is_called_is_noticed(image):
    model = randomise(Listed(3, 2)).eval()
    fuse(model).freeze()
    want = 2 * output(model, image)
    model.twice = True
    assert torch.equal(output(model, image), want)


def test_blocks_in_a_dictionary():
    model = nn.Sequential(nn.ModuleDict({"a": block(16), "b": block(16)}))
    assert len(fuse(model).fused) == 2


@pytest.mark.parametrize("stage", [lambda: Outside(16, 2), lambda: NoisyInTraining(16, 2), Backwards])
def test_other_containers_run_as_they_are(stage, image, runs):
    model = randomise(nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 4, 4), norm(16)), stage())).eval()
    want = output(model, image)
    assert len(fuse(model).freeze().frozen) == 3
    assert relative_error(output(model, image), want) <= FLOAT32_BOUND
    assert runs == []


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("name", "change", "backend"), changes_of(HOSTS), indirect=["backend"])
def test_a_changed_layer_is_noticed(name, change, image):
    torch.manual_seed(3)
    model = host(name)
    report = fuse(model).freeze()
    first = model.get_submodule(report.fused[0])
    fc1 = next(name for name, layer in first.named_children() if type(layer) is nn.Linear)
    patches = model.get_submodule(report.patch_layers[1])
    for holder, layer in ((first, fc1), (patches, "1")):
        before = output(model, image)
        LAYER_CHANGES[change](holder, layer)
        after = output(model, image)
        assert relative_error(after, before) > 1e-3, layer
        check(model, image, after)


@pytest.mark.parametrize("kind", averages())
def test_averages(kind, image):
    averaged = averages()[kind](host("transformers"))
    averaged.update_parameters(host("transformers"))
    fuse(averaged.module).freeze()
    before = output(averaged.module, image)
    averaged.update_parameters(host("transformers", seed=1))
    after = output(averaged.module, image)
    assert relative_error(after, before) > 1e-3
    check(averaged.module, image, after)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradients_of_what_is_folded_are_off_until_it_is_unfrozen(image):
    model = host("transformers")
    model.convnext.encoder.stages[0].layers[0].dwconv.requires_grad_(False)
    before = trainable(model)
    report = fuse(model).freeze().freeze()
    assert trainable(model) == {
        "convnext.layernorm.weight",
        "convnext.layernorm.bias",
        "classifier.weight",
        "classifier.bias",
    }
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, image), output(model, image))
        twin.train()
        assert trainable(twin) == before
        assert fused_calls(twin(image)) == 5
    assert len(report.frozen) == 8
    stage = model.convnext.encoder.stages[1]
    stage.train()
    assert {name for name in before if ".stages.1." in name} <= trainable(model)
    assert len(report.frozen) == 8 - 2
    model.train()
    assert trainable(model) == before
    assert report.frozen == ()


def test_a_loaded_state_dict_unfreezes(image):
    model, other = host("transformers"), host("transformers", seed=1)
    report = fuse(model).freeze()
    stage = model.convnext.encoder.stages[1]
    stage.load_state_dict(other.convnext.encoder.stages[1].state_dict())
    assert not any(".stages.1." in name for name in report.frozen)
    assert report.frozen
    report.freeze()
    model.load_state_dict(other.state_dict())
    assert report.frozen == ()
    check(model, image, output(model, image))


def test_v2(image):
    v2 = randomise(ConvNextV2Model(ConvNextV2Config(hidden_sizes=[16, 24], depths=[1, 1], num_stages=2))).eval()
    plain = copy.deepcopy(v2)
    report = fuse(v2)
    assert "frozen" not in str(report)
    report.freeze()
    assert set(report.frozen) == {*report.fused, *report.patch_layers}
    assert "frozen: 4 of 4" in str(report)
    assert relative_error(output(v2, image), output(plain, image)) <= FLOAT32_BOUND
    for name in ("weight", "bias"):
        for model in (v2, plain):
            with torch.no_grad():
                getattr(model.encoder.stages[1].layers[0].grn, name).mul_(1.5)
        assert relative_error(output(v2, image), output(plain, image)) <= FLOAT32_BOUND, name


def test_where_nothing_is_fused_nothing_is_frozen():
    with pytest.raises(ValueError, match=r"freeze\(\) found nothing that runs on the fused ops:\nLinear: no Conv"):
        fuse(nn.Linear(2, 2)).freeze()


def test_own_models(image):
    model = randomise(convnext_fast.ConvNext(convnext_fast.ConvNextConfig(**SHAPE))).eval()
    report = fuse(model).freeze()
    assert len(report.frozen) == 8
    assert not trainable(model)
    report.unfreeze()
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert relative_error(output(model, image), output(model.freeze(), image)) <= FLOAT32_BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_conversions_and_autocast(dtype, image):
    model = host("written")
    fuse(model).freeze()
    output(model, image)
    exact = copy.deepcopy(model).double()
    unfuse(exact)
    want = output(exact, image.double())
    plain = copy.deepcopy(model).to(dtype)
    unfuse(plain)
    eager = output(plain, image.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(output(model, image), want) <= 0.05
    assert relative_error(output(model.to(dtype), image.to(dtype)), want) <= 2 * max(relative_error(eager, want), 1e-14)


def test_gradients_of_the_input(image):
    model, plain = host("written"), host("written")
    fuse(model).freeze()
    found = []
    for each in (model, plain):
        x = image.clone().requires_grad_()
        found.append(torch.autograd.grad(each(x).square().sum(), x)[0])
    assert relative_error(*found) <= FLOAT32_BOUND


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "transformers" else pytest.mark.thorough) for name in HOSTS]
)
def test_compiles(name, image):
    torch.manual_seed(3)
    model = host(name)
    report = fuse(model).freeze()
    compiled = torch.compile(model, backend="aot_eager")
    check(model, image, output(compiled, image))
    block = model.get_submodule(report.fused[0])
    LAYER_CHANGES["add_"](block, "pwconv1" if hasattr(block, "pwconv1") else "pointwise_conv1")
    check(model, image, output(compiled, image))
