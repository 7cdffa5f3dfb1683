"""A training step of a fused model of another library through every kernel in Triton's interpreter."""

import copy

import pytest
import torch
from model_cases import relative_errors
from transformers import ConvNextConfig, ConvNextForImageClassification

from convnext_fast import fuse
from convnext_fast.backends import environment

FIELDS = {"hidden_sizes": [16, 40], "depths": [1, 1], "num_stages": 2, "num_labels": 5, "layer_scale_init_value": 1.0}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(environment, "REQUEST", "triton")


@torch.no_grad()
def host(dtype):
    generator = torch.Generator().manual_seed(0)
    model = ConvNextForImageClassification(ConvNextConfig(drop_path_rate=0.2, **FIELDS))
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else values)
    return model.to(dtype).train()


def step(model, x):
    """Logits, and the gradients of the image and of every parameter, for one draw of drop path and of the cotangent."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = model(x).logits
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], cotangent)]


@pytest.mark.parametrize(("dtype", "recompute"), [(torch.float32, 2), (torch.float16, 1)])
def test_training_step(dtype, recompute):
    """At a size that no stride divides, with the bound of `model_cases.check_training_step`."""
    model = host(dtype)
    x = torch.randn(2, 3, 42, 29, generator=torch.Generator().manual_seed(5)).to(dtype)
    eager, exact = step(model, x), step(copy.deepcopy(model).double(), x.double())
    report = fuse(model, recompute=recompute, strict=True)
    assert (len(report.fused), len(report.patch_layers)) == (2, 2)
    ours, theirs = relative_errors(step(model, x), exact), relative_errors(eager, exact)
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()
    assert (ours <= (4 * theirs).clamp(min=1e-5)).all(), (ours / theirs).tolist()
