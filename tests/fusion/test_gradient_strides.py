"""Gradients lie in memory as their parameters do, so that DistributedDataParallel warns of nothing new."""

import pytest
import torch
from fuse_support import one_thread  # noqa: F401
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

from convnext_fast import ConvNext, fuse
from convnext_fast.config import ConvNextConfig as OwnConfig

SHAPE = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 3}


class Convolutional(nn.Module):
    """A block whose linear layers are 1×1 convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = ConvNextLayerNorm(channels, data_format="channels_first")
        self.fc1, self.act, self.fc2 = nn.Conv2d(channels, 24, 1), nn.GELU(), nn.Conv2d(24, channels, 1)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(self.norm(self.dwconv(x)))))


MODELS = {
    "own": lambda: ConvNext(OwnConfig(**SHAPE)),
    "transformers": lambda: fuse(ConvNextForImageClassification(ConvNextConfig(**SHAPE)), strict=True).model,
    "convolutional": lambda: fuse(nn.Sequential(nn.Conv2d(3, 8, 1), Convolutional(8)), strict=True).model,
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_have_the_strides_of_their_parameters(name, memory_format):
    torch.manual_seed(0)
    model = MODELS[name]().to(memory_format=memory_format)
    outputs = model(torch.randn(2, 3, 16, 16))
    getattr(outputs, "logits", outputs).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad.stride() != p.stride()] == []
