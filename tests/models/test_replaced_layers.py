"""Where a layer was replaced, wrapped or parametrised, our models compute what transformers' do with the same layer."""

from __future__ import annotations

import pytest
import torch
import transformers
from support import BOUNDS, gradients, randomise, relative_error
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import convnext_fast

# The maps are as wide as they have channels, so that the shape does not reveal a norm along the wrong axis.
SIZES = {"num_stages": 2, "hidden_sizes": [8, 4], "depths": [1, 1], "num_labels": 3}
X = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class OverMaps(nn.LayerNorm):
    """A LayerNorm over the channels of (N, C, H, W), times 2."""

    def forward(self, x):
        return 2 * super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OverChannelsLast(nn.LayerNorm):
    def forward(self, x):
        return torch.sin(super().forward(x))


class Wrapped(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * self.base_layer(x)


class Squared(nn.Module):
    def forward(self, weight):
        return weight * weight


def stem(model):
    return model.convnext.embeddings, "layernorm"


def downsampling(model):
    return model.convnext.encoder.stages[1].downsampling_layer, "0"


def block(name):
    return lambda model: (model.convnext.encoder.stages[1].layers[0], name)


def wrap(layer):
    return Wrapped(layer)


def square(layer):
    return parametrize.register_parametrization(layer, "weight", Squared())


CASES = {
    "stem, subclass": (stem, lambda _: OverMaps(8)),
    "stem, wrapped": (stem, wrap),
    "stem, parametrised": (stem, square),
    "stem, batch norm": (stem, lambda _: nn.BatchNorm2d(8)),
    "downsampling, subclass": (downsampling, lambda _: OverMaps(8)),
    "downsampling, wrapped": (downsampling, wrap),
    "downsampling, parametrised": (downsampling, square),
    "block, subclass": (block("layernorm"), lambda _: OverChannelsLast(4)),
    "block, wrapped norm": (block("layernorm"), wrap),
    "block, parametrised norm": (block("layernorm"), square),
    "block, weight norm": (block("pwconv1"), parametrizations.weight_norm),
    "block, spectral norm": (block("dwconv"), parametrizations.spectral_norm),
    "block, wrapped linear layer": (block("pwconv2"), wrap),
}


@pytest.mark.filterwarnings("ignore:.*calls its layers one by one:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_replaced_layers(case):
    place, replace = CASES[case]
    results = []
    for library in (transformers, convnext_fast):
        model = randomise(library.ConvNextForImageClassification(library.ConvNextConfig(**SIZES))).double().eval()
        parent, name = place(model)
        torch.manual_seed(0)
        setattr(parent, name, replace(getattr(parent, name)).double().eval())
        randomise(model)
        out = model(X, output_hidden_states=True)
        outputs = [out.logits, *out.hidden_states]
        results.append(dict(enumerate(outputs)) | gradients(model, outputs, []))
    theirs, ours = results
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert relative_error(ours[name], value) <= BOUNDS[torch.float64], name


def test_the_warning_names_module_and_class():
    model = convnext_fast.ConvNextModel(convnext_fast.ConvNextConfig(**SIZES)).double()
    model.embeddings.layernorm = OverMaps(8).double()
    message = (
        r"ConvNextEmbeddings calls its layers one by one: layernorm is now \S*test_replaced_layers\.OverMaps, not "
    )
    with pytest.warns(RuntimeWarning, match=r"convnext_fast\.models\.\S*" + message + r"convnext_fast\.models\.layers"):
        model(X)


def test_hooks_see_the_layout_of_timm():
    model = convnext_fast.ConvNext(convnext_fast.ConvNextConfig(**SIZES)).double()
    seen = []
    for layer in (model.stem[1], model.stages[1].downsample[0]):
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].shape, output.shape)))
    with pytest.warns(RuntimeWarning, match="hooks on"):
        model(X)
    assert seen == [((2, 8, 8, 8), (2, 8, 8, 8))] * 2
