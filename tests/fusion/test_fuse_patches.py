"""`fuse` on stems and downsampling layers: agreement, what it preserves, and every reason to leave one alone."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from fuse_support import check_bfloat16, everything, fused_calls, one_thread  # noqa: F401
from support import BOUNDS, FLOAT32_BOUND, randomise, relative_error
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2Model,
    DINOv3ConvNextBackbone,
    DINOv3ConvNextConfig,
)
from transformers.models.convnext.modeling_convnext import ConvNextLayer, ConvNextLayerNorm

import convnext_fast
from convnext_fast import fuse, unfuse

WIDTH = 8
SHAPE = {"hidden_sizes": [7, 12, 10], "depths": [1, 1, 1], "num_stages": 3, "drop_path_rate": 0.4}
DINOV3 = {"hidden_sizes": [7, 12, 10, 8], "depths": [1, 1, 1, 1], "layer_scale_init_value": 1.0}


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (N, C, H, W), as the official code writes it."""

    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps
        self.normalized_shape = (channels,)

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + self.eps).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def block():
    return ConvNextLayer(ConvNextConfig(layer_scale_init_value=1.0), WIDTH)


def patches(channels=WIDTH, **options):
    return nn.Conv2d(channels, WIDTH, **{"kernel_size": 2, "stride": 2, **options})


def channels_first():
    return ConvNextLayerNorm(WIDTH, data_format="channels_first")


def official(**layers):
    """A stem, a block, a downsampling layer, a block; ``layers`` replace some by name."""
    usual = {
        "stem": nn.Sequential(patches(3, kernel_size=(4, 2), stride=(4, 2)), channels_first()),
        "first": block(),
        "downsample": nn.Sequential(ChannelNorm(WIDTH, 1e-3), patches(bias=False)),
        "second": block(),
    }
    model = nn.Sequential()
    for name, layer in {**usual, **layers}.items():
        model.add_module(name, layer)
    return randomise(model)


class PairOfLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = ChannelNorm(WIDTH)
        self.reduction = patches()


class Pair(PairOfLayers):
    """A downsampling layer that is not a `torch.nn.Sequential`."""

    def forward(self, x):
        return self.reduction(self.norm(x))


HOSTS = {
    "transformers": lambda: ConvNextForImageClassification(ConvNextConfig(layer_scale_init_value=1.0, **SHAPE)),
    "transformers, v2": lambda: ConvNextV2Model(ConvNextV2Config(**SHAPE)),
    "transformers, dinov3": lambda: DINOv3ConvNextBackbone(
        DINOv3ConvNextConfig(out_features=["stage2", "stage4"], **DINOV3)
    ),
    "official": official,
    "own pair": lambda: official(downsample=Pair()),
}
COUNTS = {"transformers": 3, "transformers, v2": 3, "transformers, dinov3": 4, "official": 2, "own pair": 2}


def host(name):
    return randomise(HOSTS[name]())


@pytest.fixture
def image():
    return torch.randn(3, 3, 38, 45, generator=torch.Generator().manual_seed(0))


def downsampled(outputs):
    return fused_calls(outputs, "downsample_fwd")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HOSTS)
def test_agrees(name, dtype, layout, image):
    """At sizes that no stride divides: leftover rows and columns are ignored."""
    model = host(name).to(dtype).train()
    x = image.to(dtype).contiguous(memory_format=layout)
    expected = everything(model, x)
    report = fuse(model, strict=True)
    assert len(report.patch_layers) == COUNTS[name]
    actual = everything(model, x)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(actual[key], value) <= BOUNDS[dtype], key


@pytest.mark.parametrize("name", ["official", "own pair"])
def test_agrees_in_bfloat16(name, image):
    check_bfloat16(host(name), image)


def test_run_fused_and_back(image):
    model = host("transformers").eval()
    expected = model(image).logits
    assert fuse(model).patch_layers == (
        "convnext.embeddings",
        "convnext.encoder.stages.1.downsampling_layer",
        "convnext.encoder.stages.2.downsampling_layer",
    )
    assert downsampled(model(image)) == 2
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert downsampled(twin(image)) == 2
        unfuse(twin)
        assert downsampled(twin(image)) == 0
        assert torch.equal(twin(image).logits, expected)
    with torch.no_grad():
        assert relative_error(model(image).logits, expected) <= FLOAT32_BOUND


def test_frozen_parts_get_no_gradients(image):
    model = official()
    model.stem.requires_grad_(False)
    model.downsample[0].requires_grad_(False)
    expected = {}
    for _ in range(2):
        model.zero_grad()
        model(image).square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(relative_error(grads[name], grad) <= FLOAT32_BOUND for name, grad in expected.items())
        assert not expected or grads.keys() == expected.keys()
        expected = grads
        fuse(model)
    assert "downsample.1.weight" in expected
    assert not any(name.startswith(("stem", "downsample.0")) for name in expected)


def test_hooks_on_what_runs_them_fire(image):
    model = official()
    fuse(model)
    seen = []
    for layer in (model.stem, model.downsample):
        layer.register_forward_hook(lambda *_: seen.append("forward"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    y = model(image.requires_grad_())
    y.sum().backward()
    assert seen == ["forward", "forward", "backward", "backward"]
    assert downsampled(y) == 1


def stage(model):
    return model.convnext.encoder.stages[1]


def add_hook(model):
    stage(model).downsampling_layer[1].register_forward_hook(lambda *_: None)


def change_stride(model):
    stage(model).downsampling_layer[1].stride = (3, 3)


def append_layer(model):
    stage(model).downsampling_layer.append(nn.ReLU())


def replace_blocks(model):
    stage(model).layers = nn.Sequential(*stage(model).layers)


def subclass_weight(model):
    conv = stage(model).downsampling_layer[1]
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Odd))


class Odd(torch.Tensor):
    """Another library's kind of tensor."""


CHANGES = {
    "hooks on downsampling_layer.1, which": add_hook,
    r"stride of downsampling_layer.1 is now \(3, 3\)": change_stride,
    "downsampling_layer now holds 0, 1, 2, not 0, 1": append_layer,
    r"layers is now \S*Sequential, not \S*ModuleList": replace_blocks,
    r"weight of downsampling_layer.1 is now \S*Odd": subclass_weight,
}


@pytest.mark.parametrize("reason", CHANGES)
def test_change_after_fusing_runs_the_hosts_forward(reason, image):
    model = host("transformers").eval()
    fuse(model)
    CHANGES[reason](model)
    with pytest.warns(RuntimeWarning, match=reason):
        outputs = model(image)
    assert downsampled(outputs) == 1
    assert fused_calls(outputs) == 3
    report = fuse(model)
    assert re.search(reason, report.left_alone["convnext.encoder.stages.1.downsampling_layer"])
    unfuse(model)
    assert relative_error(model(image).logits, outputs.logits) <= FLOAT32_BOUND


def test_sequential_stays_one(image):
    """A slice of it is not a fused layer, and one with more layers runs its own forward."""
    model = official()
    fuse(model)
    x = torch.randn(2, WIDTH, 6, 5)
    part = model.downsample[:1]
    assert torch.equal(part(x), model.downsample[0](x))
    model.downsample.append(nn.ReLU())
    with pytest.warns(RuntimeWarning, match="it now holds 0, 1, 2, not 0, 1"):
        assert (model.downsample(x) >= 0).all()
    unfuse(part)
    assert type(part) is nn.Sequential
    unfuse(model)
    fuse(model := official())
    model.downsample = model.downsample[:]
    assert "downsample" in fuse(model, strict=True).patch_layers
    assert downsampled(model(image)) == 1


class Lists(nn.Module):
    """A downsampling layer in a list, and blocks, as transformers has them."""

    def __init__(self, **children):
        super().__init__()
        usual = {"downsample": nn.ModuleList([ChannelNorm(WIDTH), patches()]), "blocks": nn.ModuleList([block()])}
        for name, child in {**usual, **children}.items():
            setattr(self, name, child)


class Stage(Lists):
    def forward(self, x):
        for layer in (*self.downsample, *self.blocks):
            x = layer(x)
        return x


class Reversed(Lists):
    def forward(self, x):
        for layer in (*self.blocks, *self.downsample):
            x = layer(x)
        return x


class Activated(Pair):
    def forward(self, x):
        return super().forward(x).relu()


class ActivatedAlone(PairOfLayers):
    def forward(self, x):
        return self.reduction(self.norm(x)).relu()


class Same(nn.Conv2d):
    def forward(self, x):
        return super().forward(x)


def changed(change):
    layer = nn.Sequential(ChannelNorm(WIDTH), patches())
    change(layer)
    return layer


def norm_then(conv):
    return nn.Sequential(ChannelNorm(WIDTH), conv)


REASONS = {
    "dilation": (lambda: norm_then(patches(dilation=2)), r"its convolution 1 has dilation \(2, 2\)"),
    "overlap": (lambda: norm_then(patches(kernel_size=3)), r"has kernel \(3, 3\) and stride \(2, 2\)"),
    "padding": (lambda: norm_then(patches(padding=1)), r"has padding \(1, 1\): expected none"),
    "own convolution": (lambda: norm_then(Same(WIDTH, WIDTH, 2, 2)), "1 is Same, not a torch.nn.Conv2d"),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm2d(WIDTH), patches()), "0 is BatchNorm2d, not a LayerNorm"),
    "RMS norm": (lambda: nn.Sequential(nn.RMSNorm(WIDTH), patches()), "0 is RMSNorm, not a LayerNorm"),
    "widths": (lambda: norm_then(patches(9)), "is ChannelNorm, not a LayerNorm over the 9 channels"),
    "no affine": (
        lambda: nn.Sequential(nn.LayerNorm(WIDTH, elementwise_affine=False), patches()),
        "its LayerNorm 0 has no affine",
    ),
    "last dimension": (lambda: nn.Sequential(nn.LayerNorm(WIDTH), patches()), "its forward fails on"),
    "hooks inside": (lambda: changed(lambda pair: pair[0].register_forward_hook(lambda *_: None)), "hooks on 0, which"),
    "parametrised": (lambda: changed(lambda pair: parametrizations.weight_norm(pair[1])), "1 is parametrised"),
    "replaced forward": (
        lambda: changed(lambda pair: setattr(pair, "forward", lambda x: x)),
        "its forward was replaced",
    ),
    "integers": (
        lambda: changed(
            lambda pair: setattr(pair[1], "weight", nn.Parameter(pair[1].weight.to(torch.int8), requires_grad=False))
        ),
        r"weight of 1 \(Conv2d\) is quantised or not floating",
    ),
    "something else": (ActivatedAlone, "computes something other than a downsampling layer in evaluation"),
    "overridden": (Activated, "Activated overrides the forward of Pair"),
    "blocks first": (Reversed, "computes something other than a downsampling layer"),
    "tensor of its own": (
        lambda: changed(lambda pair: pair.register_parameter("scale", nn.Parameter(torch.ones(1)))),
        "the Sequential that runs it has tensors of its own: scale",
    ),
    "more children": (
        lambda: Stage(last=nn.Identity()),
        r"the Stage that runs it also holds blocks \(ModuleList\), last \(Identity\)",
    ),
    "no blocks": (lambda: Stage(blocks=nn.Identity()), r"holds blocks \(Identity\): expected only a list of blocks"),
}


@pytest.mark.parametrize("name", REASONS)
def test_left_alone(name):
    make, reason = REASONS[name]
    model = nn.Sequential(block(), make())
    kinds = [type(module) for module in model.modules() if not isinstance(module, ConvNextLayer)]
    report = fuse(model)
    (found,) = report.left_alone.values()
    assert re.search(reason, found), found
    assert report.patch_layers == ()
    assert [type(module) for module in model.modules() if not isinstance(module, ConvNextLayer)] == kinds
    with pytest.raises(ValueError, match=reason):
        fuse(model, strict=True)


class Silent(Lists):
    """Takes keywords and never reads them."""

    def forward(self, x, **options):
        for layer in (*self.downsample, *self.blocks):
            x = layer(x)
        return x


class Asking(Lists):
    def forward(self, x, **options):
        for layer in (*self.downsample, *self.blocks):
            x = layer(x)
        return -x if options else x


class AskingInside(Lists):
    def forward(self, x, **options):
        def sign():
            return -1 if options else 1

        for layer in (*self.downsample, *self.blocks):
            x = layer(x)
        return x * sign()


def test_keywords():
    model = randomise(Silent())
    x = torch.randn(2, WIDTH, 7, 4)
    expected = model(x, output_hidden_states=True)
    assert fuse(model, strict=True).patch_layers == ("downsample",)
    y = model(x, output_hidden_states=True)
    assert downsampled(y) == 1
    assert relative_error(y, expected) <= FLOAT32_BOUND
    model.downsample[0].register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match=r"hooks on downsample\.0"):
        assert relative_error(model(x, output_hidden_states=True), expected) <= FLOAT32_BOUND
    for kind in (Asking, AskingInside):
        assert fuse(kind()).left_alone == {"downsample": "its forward takes more than the activations"}


def test_other_pairs_are_not_named():
    """Pairs of a convolution and a norm as in decoders, and a layer whose sizes are not tuples."""
    odd = nn.Identity()
    odd.kernel_size, odd.groups, odd.in_channels, odd.stride = 3, 8, 8, 1
    model = nn.Sequential(
        block(),
        nn.Sequential(patches(kernel_size=3, stride=1, padding=1), nn.BatchNorm2d(WIDTH)),
        nn.Sequential(patches(), nn.BatchNorm2d(WIDTH)),
        nn.Sequential(nn.GroupNorm(1, WIDTH), patches(kernel_size=3, stride=1)),
        nn.Sequential(ChannelNorm(WIDTH), nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)),
        nn.Sequential(ChannelNorm(WIDTH), patches(kernel_size=1)),
        nn.Sequential(ChannelNorm(WIDTH), nn.MaxPool2d(2)),
        nn.Sequential(ChannelNorm(WIDTH), odd),
        nn.ModuleList([ChannelNorm(WIDTH), nn.Linear(WIDTH, WIDTH)]),
    )
    report = fuse(model, strict=True)
    assert report.fused == ("0",)
    assert report.patch_layers == ()
    assert "no ConvNeXt block found" in str(fuse(nn.Sequential(norm_then(patches()))))


def test_report_reads_well():
    model = official(downsample=norm_then(patches(padding=1)))
    assert str(fuse(model)) == (
        "Sequential: 3 of 4 fused: 2 blocks, 1 patch layers (stem, downsampling)\n"
        "left alone: downsample: its convolution 1 has padding (1, 1): expected none"
    )


@pytest.mark.parametrize("kind", [convnext_fast.ConvNext, convnext_fast.ConvNextForImageClassification])
def test_own_models(kind):
    model = kind(convnext_fast.ConvNextConfig(**SHAPE))
    before = [type(module) for module in model.modules()]
    assert len(fuse(model, recompute=2).patch_layers) == 3
    assert model.recompute == 2
    fuse(model)
    assert model.recompute == 2
    assert [type(module) for module in model.modules()] == before
    model.fused = False
    assert len(fuse(model).left_alone) == 6


def test_written_out_norm_of_a_stem_is_left_alone():
    """Under autocast its result is float32, which the residual stream keeps."""
    model = official(stem=nn.Sequential(patches(3), ChannelNorm(WIDTH)))
    reason = "its output under autocast is torch.float32, not torch.bfloat16 as with PyTorch's LayerNorm"
    assert fuse(model).left_alone == {"stem": reason}
