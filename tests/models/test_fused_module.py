"""Our models with replaced layers or with hooks: these layers are called, with ``fused`` set or not."""

from __future__ import annotations

import copy

import pytest
import torch
from support import BOUNDS, randomise, relative_error
from torch import nn
from torch.nn.utils import prune

from convnext_fast import ConvNext, ConvNextConfig, ConvNextForImageClassification, fuse

CONFIG = {"num_stages": 2, "hidden_sizes": [8, 12], "depths": [1, 2], "num_labels": 5}
both = pytest.mark.parametrize("made", [ConvNext, ConvNextForImageClassification])


def model_of(made=ConvNext, fused=True):
    return randomise(made(ConvNextConfig(**CONFIG), fused=fused, dtype=torch.float64)).eval()


def image():
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def logits(model):
    y = model(image())
    return y if isinstance(y, torch.Tensor) else y.logits


class Adapted(nn.Module):
    """A low-rank adapter around a linear layer, which keeps the layer's attributes."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class Wrapped(nn.Module):
    """Calls a layer, as adapters, compilers and sharding do."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, x):
        return self.inner(x) + 0.5


def layer_of(model, timm, transformers):
    """(holder, name) of a layer of the second stage, by its path under either naming."""
    path = f"stages.1.{timm}" if isinstance(model, ConvNext) else f"convnext.encoder.stages.1.{transformers}"
    holder, _, name = path.rpartition(".")
    return model.get_submodule(holder), name


def adapt_fc1(model):
    holder, name = layer_of(model, "blocks.1.mlp.fc1", "layers.1.pwconv1")
    setattr(holder, name, Adapted(getattr(holder, name)))


def dilate(model):
    holder, name = layer_of(model, "blocks.1.conv_dw", "layers.1.dwconv")
    setattr(holder, name, nn.Conv2d(12, 12, 7, padding=9, dilation=3, groups=12, dtype=torch.float64))


def set_dilation(model):
    holder, name = layer_of(model, "blocks.1.conv_dw", "layers.1.dwconv")
    getattr(holder, name).dilation, getattr(holder, name).padding = (2, 2), (6, 6)


def drop_norm(model):
    setattr(*layer_of(model, "blocks.1.norm", "layers.1.layernorm"), nn.Identity())


def drop_drop_path(model):
    setattr(*layer_of(model, "blocks.1.drop_path", "layers.1.drop_path"), Twice())


def widen_downsampling(model):
    holder, name = layer_of(model, "downsample.1", "downsampling_layer.1")
    holder[int(name)] = nn.Conv2d(8, 12, 3, stride=2, padding=1, dtype=torch.float64)


def append_downsampling(model):
    holder, _ = layer_of(model, "downsample.1", "downsampling_layer.1")
    holder.append(Twice())


def hook_fc2(model):
    holder, name = layer_of(model, "blocks.1.mlp.fc2", "layers.1.pwconv2")
    getattr(holder, name).register_forward_hook(lambda module, inputs, output: 3 * output)


def replace_forward(model):
    holder, name = layer_of(model, "blocks.1.mlp.fc2", "layers.1.pwconv2")
    before = getattr(holder, name).forward
    getattr(holder, name).forward = lambda x: 2 * before(x)


def hook_stem(model):
    stem = model.stem[0] if isinstance(model, ConvNext) else model.convnext.embeddings.patch_embeddings
    stem.register_forward_hook(lambda module, inputs, output: output.abs())


def wrap_stem_norm(model):
    """Its channels come last, as in the norm that it wraps."""
    holder, name = (model.stem, "1") if isinstance(model, ConvNext) else (model.convnext.embeddings, "layernorm")
    setattr(holder, name, Wrapped(getattr(holder, name)))


def wrap_downsampling_norm(model):
    holder, _ = layer_of(model, "downsample.0", "downsampling_layer.0")
    holder[0] = Wrapped(holder[0])


changes = pytest.mark.parametrize(
    ("change", "reason"),
    [
        (adapt_fc1, r"fc1 is now \S*Adapted|pwconv1 is now \S*Adapted"),
        (dilate, "padding of (conv_dw|dwconv) is now"),
        (set_dilation, "padding of (conv_dw|dwconv) is now"),
        (drop_norm, r"norm is now \S*Identity"),
        (drop_drop_path, r"drop_path is now \S*Twice"),
        (widen_downsampling, "kernel_size of .*1 is now"),
        (append_downsampling, "it now holds 0, 1, 2, not 0, 1"),
        (hook_fc2, "hooks on (mlp.fc2|pwconv2)"),
        (replace_forward, "the forward of (mlp.fc2|pwconv2) was replaced"),
        (hook_stem, "hooks on (0|patch_embeddings)"),
        (wrap_stem_norm, r"(1|layernorm) is now \S*Wrapped"),
        (wrap_downsampling_norm, r"0 is now \S*Wrapped"),
    ],
)


def applied(change, model):
    torch.manual_seed(7)  # of the layers that ``change`` makes
    change(model)
    return model


def computed(made, change):
    """The logits of a changed model by its layers."""
    model = model_of(made, fused=False)
    before = logits(model)
    after = logits(applied(change, model))
    assert relative_error(after, before) > 1e-3
    return after


@both
@changes
def test_changed_layers_are_called(made, change, reason):
    want = computed(made, change)
    model = applied(change, model_of(made))
    with pytest.warns(RuntimeWarning, match=reason):
        assert relative_error(logits(model), want) <= BOUNDS[torch.float64]
    assert len(fuse(model).left_alone) == 1
    with pytest.raises(ValueError, match=reason):
        fuse(model, strict=True)


@both
@changes
def test_freezing_before_or_after_a_change_computes_it(made, change, reason):
    want = computed(made, change)
    for model in (applied(change, model_of(made)).freeze(), applied(change, model_of(made).freeze())):
        with pytest.warns(RuntimeWarning, match=reason):
            assert relative_error(logits(model), want) <= BOUNDS[torch.float64]


@both
def test_adapters_are_trained(made):
    model = model_of(made).train()
    adapt_fc1(model)
    with pytest.warns(RuntimeWarning, match="Adapted"):
        logits(model).square().sum().backward()
    adapter = layer_of(model, "blocks.1.mlp.fc1", "layers.1.pwconv1")
    adapter = getattr(*adapter)
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


@both
def test_plain_models_call_their_layers(made):
    model = model_of(made, fused=False)
    called = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    logits(model)
    silent = {name for name, _ in model.named_modules()} - set(called)
    # Lists have no forward.
    assert all(isinstance(model.get_submodule(name), nn.ModuleList) for name in silent), silent
    assert len(called) > 20


def test_other_layers_of_the_model_are_called():
    model = model_of()
    want = model.forward_features(image())
    for change, factor in (
        (lambda m: setattr(m, "norm_pre", Twice()), 2),
        (lambda m: setattr(m.stages[1], "blocks", nn.Sequential(*m.stages[1].blocks, Twice())), 2),
    ):
        changed = copy.deepcopy(model)
        change(changed)
        assert relative_error(changed.forward_features(image()), factor * want) <= BOUNDS[torch.float64]
    model.head = nn.Identity()
    assert torch.equal(model(image()), want)


def test_settings_read_on_every_call_are_not_a_change(recwarn):
    model, plain = model_of(), model_of(fused=False)
    for each in (model, plain):
        for block in each.blocks():
            block.norm.eps, block.drop_path.rate = 0.5, 0.25
    torch.manual_seed(0)
    got = model.train()(image())
    torch.manual_seed(0)
    want = plain.train()(image())
    assert relative_error(got, want) <= BOUNDS[torch.float64]
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_parametrised_weights():
    model, plain = model_of(), model_of(fused=False)
    for each in (model, plain):
        nn.utils.parametrizations.weight_norm(each.stages[1].blocks[0].mlp.fc1)
        prune.l1_unstructured(each.stages[1].blocks[1].mlp.fc2, "weight", 0.5)
    for _ in range(2):  # pruning computes the weight in a hook: a graph used twice would show in a second step
        gradients = []
        for each in (model, plain):
            each.zero_grad()
            each(image()).square().sum().backward()
            gradients.append([parameter.grad for parameter in each.parameters()])
        for got, want in zip(*gradients, strict=True):
            assert relative_error(got, want) <= BOUNDS[torch.float64]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_moved_parameters_are_not_a_change():
    """FullyShardedDataParallel takes them out of the layers and leaves views in their place."""
    model = model_of()
    want = model(image())
    for module in model.modules():
        for name in list(module._parameters):
            value = module._parameters.pop(name)
            setattr(module, name, value.detach())
    assert torch.equal(model(image()), want)


@both
def test_another_activation(made):
    model, plain = model_of(made), model_of(made, fused=False)
    before = logits(model)
    for each in (model, plain):
        for block in each.blocks():
            block.act_name = "relu"
    assert relative_error(logits(model), logits(plain)) <= BOUNDS[torch.float64]
    assert relative_error(logits(model), before) > 1e-3
