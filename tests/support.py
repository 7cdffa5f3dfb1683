"""What the tests share: random models and relative errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import nn

FLOAT32_BOUND = 1e-5
FLOAT64_BOUND = 1e-10
BOUNDS = {torch.float32: FLOAT32_BOUND, torch.float64: FLOAT64_BOUND}


def relative_error(actual: torch.Tensor, expected: torch.Tensor, least: float = 0.0) -> float:
    """‖actual − expected‖ / max(‖expected‖, least) in float64; NaN or a shape that differs counts as infinite."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.detach().double() - expected.detach().double()).norm().item()
    norm = max(expected.detach().double().norm().item(), least)
    error = difference / norm if norm else difference
    return error if error == error else float("inf")


def no_worse(actual: torch.Tensor, expected: torch.Tensor, eager: torch.Tensor, least: float = 0.0) -> bool:
    """Whether ``actual`` errs at most twice as much as ``eager``, which over few elements may be exact by luck."""
    return no_worse_together([(actual, expected, eager)], [least])


def draws_for(values: int, together: int = 128) -> range:
    """Draws that leave little to luck, where the smallest result has so many ``values``: so many of these together."""
    return range(-(-together // values))


def no_worse_together(draws: Iterable[tuple[torch.Tensor, ...]], least: Iterable[float] = ()) -> bool:
    """`no_worse` in the geometric mean of draws (actual, expected, eager, …): a rare draw whose terms nearly cancel
    decides nothing, but none may err 100 times as much as eager, where in 13,000 draws of the smallest shapes nine
    times was the most. Of several eagers, which sum in different orders, the worst counts.
    """
    ratios = []
    for (actual, expected, *eager), size in itertools.zip_longest(draws, least, fillvalue=0.0):
        eps = torch.finfo(eager[0].dtype).eps
        ours, *theirs = (max(relative_error(each, expected, size), eps) for each in (actual, *eager))
        ratios.append(math.log(ours / max(theirs)))
    return bool(ratios) and sum(ratios) <= len(ratios) * math.log(2) and max(ratios) <= math.log(100)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that hide no bug: layer scales, affines and biases from N(0, 1), weights scaled."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            values /= parameter[0].numel() ** 0.5
        parameter.copy_(values)
    return model


def gradients(model: nn.Module, outputs: list[torch.Tensor], inputs: list[torch.Tensor], seed: int = 1) -> dict:
    """Gradients of outputs, weighted by a random cotangent each, for the inputs and every parameter by name."""
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(outputs, [*inputs, *parameters], cotangents, allow_unused=True)
    return dict(zip([f"input {i}" for i in range(len(inputs))] + list(names), grads, strict=True))
