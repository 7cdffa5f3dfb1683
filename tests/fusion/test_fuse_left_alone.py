"""Every reason for which `fuse` leaves a block alone; such a block keeps its class."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from fuse_support import one_thread  # noqa: F401
from support import randomise
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import ConvNextConfig, ConvNextModel, ConvNextV2Config, ConvNextV2Model
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

from convnext_fast import fuse

WIDTH = 8


def layer(kind=ConvNextLayer, **fields):
    return randomise(kind(ConvNextConfig(layer_scale_init_value=1.0, **fields), WIDTH)).eval()


def convolution(**options):
    return nn.Conv2d(WIDTH, WIDTH, **{"kernel_size": 7, "padding": 3, "groups": WIDTH, **options})


def with_part(name, part):
    """A block with one of its layers replaced."""
    block = layer()
    setattr(block, name, part)
    return block


def changed(change):
    """A block after ``change`` was called on it."""
    block = layer()
    change(block)
    return block


class Counting(ConvNextLayer):
    """Its forward does something else, too."""

    def forward(self, features):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(features)


class Plain(nn.Module):
    """The layers of a block of no known library."""

    def __init__(self, **parts):
        super().__init__()
        usual = {
            "spatial": convolution(),
            "norm": nn.LayerNorm(WIDTH),
            "expand": nn.Linear(WIDTH, 3 * WIDTH),
            "act": nn.SiLU(),
            "shrink": nn.Linear(3 * WIDTH, WIDTH),
        }
        for name, part in {**usual, **parts}.items():
            setattr(self, name, part)

    def branch(self, x):
        n = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        return self.shrink(self.act(self.expand(n))).permute(0, 3, 1, 2)


class Written(Plain):
    def forward(self, x):
        return x + self.branch(x)


class NoResidual(Plain):
    forward = Plain.branch


class Doubled(Plain):
    def forward(self, x):
        return x + self.branch(x) * (2.0 if self.training else 1.0)


class Conditioned(Plain):
    def forward(self, x, condition=None):
        return x if condition is None else x + condition


class Pair(Plain):
    def forward(self, x):
        return x, x


class Failing(Plain):
    def forward(self, x):
        raise RuntimeError("only on Sundays")


class BatchDropPath(nn.Module):
    """Draws for each pixel, not for each sample."""

    drop_prob = 0.1

    def forward(self, x):
        return torch.dropout(x, self.drop_prob, self.training)


class Dropping(Plain):
    def forward(self, x):
        return x + self.drop(self.branch(x))


def quantised_weight():
    block = layer()
    block.pwconv1 = nn.Linear(WIDTH, 4 * WIDTH)
    block.pwconv1.weight = nn.Parameter(torch.zeros(4 * WIDTH, WIDTH, dtype=torch.int8), requires_grad=False)
    return block


def dynamically_quantised():
    return torch.ao.quantization.quantize_dynamic(layer(), {nn.Linear}, dtype=torch.qint8)


def two_scales():
    block = layer()
    block.second = nn.Parameter(torch.ones(WIDTH))
    return block


def own_forward(block):
    block.forward = ConvNextLayer.forward.__get__(block)


def replaced_inside(block):
    block.pwconv1.forward = nn.Linear.forward.__get__(block.pwconv1)


REASONS = {
    "stride": (lambda: with_part("dwconv", convolution(stride=2)), r"has stride \(2, 2\)"),
    "dilation": (lambda: with_part("dwconv", convolution(dilation=2, padding=6)), r"has dilation \(2, 2\)"),
    "kernel": (lambda: with_part("dwconv", convolution(kernel_size=9, padding=4)), r"has kernel \(9, 9\)"),
    "oblong kernel": (lambda: with_part("dwconv", convolution(kernel_size=(7, 3), padding=(3, 1))), r"kernel \(7, 3\)"),
    "padding": (lambda: with_part("dwconv", convolution(padding=2)), r"has padding \(2, 2\)"),
    "padding mode": (lambda: with_part("dwconv", convolution(padding_mode="reflect")), "of mode 'reflect'"),
    "widening": (lambda: with_part("dwconv", nn.Conv2d(WIDTH, 2 * WIDTH, 7, groups=WIDTH)), "maps 8 channels to 16"),
    "own convolution": (
        lambda: with_part("dwconv", type("Same", (nn.Conv2d,), {"forward": lambda s, x: x})(8, 8, 7, groups=8)),
        "dwconv is Same, not a torch.nn.Conv2d",
    ),
    "activation": (lambda: layer(hidden_act="quick_gelu"), r"act \(QuickGELUActivation\) is none of gelu"),
    "trained activation": (lambda: with_part("act", nn.PReLU()), r"act \(PReLU\) is none of gelu"),
    "no activation": (lambda: with_part("act", nn.Identity()), "between its linear layers it has nothing"),
    "two activations": (
        lambda: with_part("act", nn.Sequential(nn.GELU(), nn.GELU())),
        r"act.0 \(GELU\), act.1 \(GELU\)",
    ),
    "batch norm": (lambda: with_part("layernorm", nn.BatchNorm2d(WIDTH)), "is BatchNorm2d, not a LayerNorm over the 8"),
    "group norm": (lambda: with_part("layernorm", nn.GroupNorm(1, WIDTH)), "is GroupNorm, not a LayerNorm"),
    "RMS norm": (lambda: with_part("layernorm", nn.RMSNorm(WIDTH)), "is RMSNorm, not a LayerNorm"),
    "norm over pixels": (
        lambda: with_part("layernorm", nn.LayerNorm([4, WIDTH])),
        "is LayerNorm, not a LayerNorm over",
    ),
    "shortcut": (lambda: Written(shortcut=nn.Conv2d(WIDTH, WIDTH, 1)), r"it also holds shortcut \(Conv2d\)"),
    "dropout": (lambda: with_part("drop_path", nn.Dropout(0.1)), "drop_path drops activations at rate 0.1"),
    "drop path by pixel": (lambda: Dropping(drop=BatchDropPath()), "something other than a ConvNeXt block in training"),
    "two drop paths": (lambda: Written(a=BatchDropPath(), b=BatchDropPath()), "two stochastic depths, a and b"),
    "hooks inside": (
        lambda: changed(lambda block: block.dwconv.register_forward_hook(lambda *_: None)),
        "hooks on dwconv, which the fused forward does not call",
    ),
    "backward hooks inside": (
        lambda: changed(lambda block: block.act.register_full_backward_hook(lambda *_: None)),
        "hooks on act, which",
    ),
    "parametrised": (
        lambda: changed(lambda block: parametrizations.weight_norm(block.pwconv2)),
        "pwconv2 is parametrised",
    ),
    "parametrised scale": (
        lambda: changed(lambda b: parametrize.register_parametrization(b, "layer_scale_parameter", nn.Softplus())),
        "its layer scale is parametrised",
    ),
    "quantised": (
        quantised_weight,
        r"weight of pwconv1 \(Linear\) is quantised or not floating: Parameter of torch.int8",
    ),
    "dynamically quantised": (dynamically_quantised, r"pwconv1 \(Linear\) is quantised or adapted"),
    "no bias": (lambda: Written(expand=nn.Linear(WIDTH, 3 * WIDTH, bias=False)), r"expand \(Linear\) has no bias"),
    "widths": (lambda: Written(shrink=nn.Linear(2 * WIDTH, WIDTH)), r"map \(8, 24\) and \(16, 8\)"),
    "strided 1×1": (
        lambda: Written(expand=nn.Conv2d(WIDTH, WIDTH, 1), shrink=nn.Conv2d(WIDTH, WIDTH, 1, stride=2)),
        r"its 1×1 convolutions have stride \(2, 2\)",
    ),
    "own tensors": (two_scales, r"its own tensors are layer_scale_parameter \(8,\), second \(8,\)"),
    "overridden forward": (lambda: layer(Counting), "Counting overrides the forward of ConvNextLayer"),
    "replaced forward": (lambda: changed(own_forward), "its forward was replaced"),
    "replaced inside": (lambda: changed(replaced_inside), "the forward of pwconv1 was replaced"),
    "more inputs": (Conditioned, "its forward takes more than the activations"),
    "no residual": (NoResidual, "something other than a ConvNeXt block in evaluation"),
    "something else": (Doubled, "something other than a ConvNeXt block in training"),
    "another output": (Pair, "returns something other than the activations"),
    "failing": (Failing, r"its forward fails on \(8, 8, 2, 3\) float32: only on Sundays"),
}


@pytest.mark.parametrize("name", REASONS)
def test_left_alone(name):
    make, reason = REASONS[name]
    block = make()
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 2), block)
    kinds = [type(module) for module in model.modules()]
    report = fuse(model)
    (found,) = report.left_alone.values()
    assert re.search(reason, found), found
    assert report.fused == ()
    assert [type(module) for module in model.modules()] == kinds


class Centred(ConvNextV2GRN):
    """A response norm of another formula."""

    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean((1, 2), keepdim=True))


class Larger(ConvNextV2GRN):
    """A response norm with an epsilon that matters only for small activations."""

    def forward(self, h):
        norms = h.square().sum((1, 2), keepdim=True).sqrt()
        return self.weight * h * norms / (norms.mean(-1, keepdim=True) + 1e-5) + self.bias + h


class Tall(ConvNextV2GRN):
    """A response norm with an epsilon as an attribute."""

    eps = 1e-5


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Centred(32), "its grn computes something other than a global response norm"),
        (Larger(32), "its grn computes something other than a global response norm"),
        (Tall(32), r"eps of grn \(Tall\) is 1e-05: expected 1e-06"),
        (nn.Sequential(ConvNextV2GRN(32), ConvNextV2GRN(32)), "is not the one global response norm"),
        (nn.BatchNorm2d(32), "is not the one global response norm"),
        (nn.LayerNorm(16), "between its linear layers it has act"),
    ],
)
def test_v2_with_another_norm_is_left_alone(norm, reason):
    model = ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8], depths=[1], num_stages=1))
    model.encoder.stages[0].layers[0].grn = norm
    assert re.search(reason, next(iter(fuse(model).left_alone.values())))


def test_one_block_left_alone_does_not_affect_the_others():
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 2], num_stages=2))
    model.encoder.stages[1].layers[0].dwconv.register_forward_hook(lambda *_: None)
    report = fuse(model)
    assert report.fused == ("encoder.stages.0.layers.0", "encoder.stages.1.layers.1")
    assert list(report.left_alone) == ["encoder.stages.1.layers.0"]


class Applying(Plain):
    """Applies a function to the branch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return x + self.function(self.branch(x))


def test_blocks_that_differ_by_a_function_are_each_run():
    report = fuse(nn.Sequential(Applying(torch.clone), Applying(torch.neg), Applying(torch.clone)))
    assert report.fused == ("0", "2")
    assert report.left_alone == {"1": "its forward computes something other than a ConvNeXt block in evaluation"}


@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_blocks_of_unknown_libraries_are_found(affine):
    """By their layers: names, the hidden width and which affine parameters LayerNorm has are free."""
    block = randomise(Written(norm=nn.LayerNorm(WIDTH, **affine)))
    twin = copy.deepcopy(block)
    assert fuse(twin, strict=True).fused == ("",)
    x = torch.randn(2, WIDTH, 6, 5)
    assert (twin(x) - block(x)).norm() <= 1e-5 * block(x).norm()


def test_wrong_arguments_are_named():
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1))
    for level in (3, -1, "1"):
        with pytest.raises(ValueError, match=f"recompute is {level!r}: expected 0, 1 or 2, or None"):
            fuse(model, recompute=level)
    fuse(model)
    with pytest.raises(ValueError, match="the image has 1 channels: expected 3"):
        model(torch.randn(2, 1, 32, 32))


def test_other_networks_hold_no_block():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    assert "no ConvNeXt block found" in str(fuse(network))


class Boxed(Plain):
    """Its layers are in a container, as torchvision's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Sequential(self.expand, self.act, self.shrink)
        del self.expand, self.act, self.shrink

    def forward(self, x):
        return x + self.linear(self.norm(self.spatial(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Negating(nn.Module):
    def forward(self, x):
        return -x


def drop_bias(block):
    block.linear[0].bias = None


def append(block):
    block.linear.append(Negating())


@pytest.mark.parametrize(
    ("change", "reason"),
    [(append, "linear now holds 0, 1, 2, 3, not"), (drop_bias, "linear.0 now has no bias")],
)
def test_changes_of_a_container_or_a_bias_after_fusing_are_noticed(change, reason):
    block = randomise(Boxed())
    twin = copy.deepcopy(block)
    assert fuse(twin, strict=True).fused == ("",)
    x = torch.randn(2, WIDTH, 6, 5)
    before = block(x)
    for each in (block, twin):
        change(each)
    with pytest.warns(RuntimeWarning, match=reason):
        assert torch.equal(twin(x), block(x))
    assert not torch.equal(block(x), before)
