"""What whole models keep for the backward pass, counted on tensors without values."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from convnext_fast import ConvNext, fuse

IMAGES = 2


def megabytes_saved(model):
    """Bytes of the storages that a call in bfloat16 at 224² saves beside the parameters, for each image, in MB."""
    mode = FakeTensorMode()
    model = model.to(torch.bfloat16).train()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(mode.from_tensor(parameter.detach()))
    held = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            saved[storage._cdata] = storage
        return tensor

    with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.empty(IMAGES, 3, 224, 224, dtype=torch.bfloat16))
    return sum(storage.nbytes() for storage in saved.values()) / IMAGES / 1e6


@pytest.mark.parametrize(("level", "most"), [(0, 28.0), (1, 11.0), (2, 7.0)])
def test_convnext_tiny(level, most):
    model = ConvNext("tiny")
    model.recompute = level
    assert megabytes_saved(model) <= most


HOSTS = {
    "ConvNeXt": lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig()),
    "DINOv3": lambda: transformers.DINOv3ConvNextModel(
        transformers.DINOv3ConvNextConfig(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3])
    ),
}


@pytest.mark.parametrize("name", HOSTS)
def test_fused_models_and_the_eager_ones(name):
    assert megabytes_saved(HOSTS[name]()) == pytest.approx(54.7, abs=0.5)
    for level, most in ((0, 28.0), (1, 11.0), (2, 7.0)):
        model = HOSTS[name]()
        report = fuse(model, recompute=level, strict=True)
        assert (len(report.fused), len(report.patch_layers)) == (18, 4)
        # A copy keeps the level, and so does another call without one.
        model = copy.deepcopy(model)
        fuse(model)
        assert megabytes_saved(model) <= most
