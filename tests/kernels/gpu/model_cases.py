"""A small model's training step and the demo's digits, for the interpreter and for executed machine code."""

from __future__ import annotations

import copy

import torch
from kernel_support import eager_products

from convnext_fast import ConvNext, ConvNextConfig, ConvNextForImageClassification
from convnext_fast.cli.demo import ASSETS
from convnext_fast.images.processor import ConvNextImageProcessor
from convnext_fast.training.digits import load_digits

CONFIG = ConvNextConfig(num_stages=2, hidden_sizes=[16, 40], depths=[1, 1], num_labels=5, drop_path_rate=0.2)


@torch.no_grad()
def small_model(dtype: torch.dtype) -> ConvNext:
    """Two stages with every parameter from N(0, 1), matrices scaled, in training mode."""
    generator = torch.Generator().manual_seed(0)
    model = ConvNext(CONFIG)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else values)
    return model.to(dtype).train()


def training_step(model: ConvNext, x: torch.Tensor, fused: bool) -> list[torch.Tensor]:
    """Logits and the gradient of every parameter, for one draw of drop path and of the cotangent."""
    model.fused = fused
    torch.manual_seed(3)
    y = model(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    return [y.detach(), *torch.autograd.grad(y, list(model.parameters()), cotangent)]


def relative_errors(results: list[torch.Tensor], exact: list[torch.Tensor]) -> torch.Tensor:
    """‖a − b‖/‖b‖ of each pair."""
    return torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(results, exact, strict=True)])


def check_training_step(dtype: torch.dtype, recompute: int, through_kernels) -> float:
    """The error of a step with the kernels against float64 is at most twice eager's in that dtype and precision.

    It compares the root mean square of the relative errors of the logits and of all gradients. Each error alone may be
    four times eager's, because a single small gradient's error is a matter of luck, also in eager, or the 1e-5 that all
    paths must keep in float32: the identity behind γ's gradient sums terms larger than their sum. Returns that mean.
    """
    model = small_model(dtype)
    model.recompute = recompute
    x = torch.randn(2, 3, 40, 28, generator=torch.Generator().manual_seed(5)).to(dtype)
    fused = through_kernels(lambda: training_step(model, x, fused=True))
    with eager_products(dtype):
        eager = training_step(model, x, fused=False)
    exact = training_step(copy.deepcopy(model).double(), x.double(), fused=False)
    ours, theirs = relative_errors(fused, exact), relative_errors(eager, exact)
    typical = ours.square().mean().sqrt()
    assert typical <= 2 * theirs.square().mean().sqrt()
    assert (ours <= (4 * theirs).clamp(min=1e-5)).all(), (ours / theirs).tolist()
    return typical.item()


def check_digits(count: int, dtype: torch.dtype, through_kernels) -> None:
    """The first ``count`` held-out digits get the same labels from the frozen kernels as from the plain reference."""
    digits = load_digits()[1]
    processor = ConvNextImageProcessor.from_pretrained(ASSETS)
    x = processor([digits.open(i, 1) for i in range(count)], return_tensors="pt").pixel_values
    model = ConvNextForImageClassification.from_pretrained(ASSETS)
    with torch.no_grad():
        model.fused = False
        expected = model(x).logits
        model.fused = True
        logits = through_kernels(lambda: model.freeze().to(dtype)(x.to(dtype)).logits)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    assert (logits.float() - expected).abs().max() <= 32 * torch.finfo(dtype).eps * expected.abs().max()
