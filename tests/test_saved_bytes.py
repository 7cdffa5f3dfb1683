"""What whole models keep for the backward pass, counted on tensors without values."""

from __future__ import annotations

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


def test_a_fused_model_and_the_eager_one():
    eager = transformers.ConvNextForImageClassification(transformers.ConvNextConfig())
    assert megabytes_saved(eager) == pytest.approx(54.7, abs=0.5)
    fused = transformers.ConvNextForImageClassification(transformers.ConvNextConfig())
    assert len(fuse(fused).fused) == 18
    # The host's own downsampling layers save 1.05 MB more than ours, their input and what they normalise.
    assert megabytes_saved(fused) <= 11.7
