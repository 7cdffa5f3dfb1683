"""What the tests of `fuse` share: a model before and after, in float32 and in bfloat16 autocast."""

from __future__ import annotations

import collections
import copy
import random

import pytest
import torch
from support import FLOAT32_BOUND, gradients, relative_error
from torch import nn

from convnext_fast import fuse


def widths(seed, count=4):
    """Random widths, odd ones among them."""
    return [random.Random(seed * 100 + i).randint(5, 40) for i in range(count)]


def tensors(outputs):
    """All tensors in a model's outputs, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values = outputs.values() if hasattr(outputs, "values") else outputs
    return [tensor for value in values if value is not None for tensor in tensors(value)]


def everything(model, x, seed=0):
    """Outputs and every gradient of a call, by name."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    outputs = tensors(model(x))
    found = {f"output {i}": output for i, output in enumerate(outputs)}
    return {**found, **{k: v for k, v in gradients(model, outputs, [x]).items() if v is not None}}


def fused_calls(outputs, name="block_fwd"):
    """How many calls of a fused operator the autograd graph of ``outputs`` holds."""
    nodes, waiting = set(), [t.grad_fn for t in tensors(outputs)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(name in node.name() for node in nodes)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from threads, which wait for each other in every depthwise convolution."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_float32(model, x):
    """Forward, gradients and three steps of an optimiser made before fusing, in training mode, stochastic depth on."""
    twin = copy.deepcopy(model).train()
    model.train()
    optimisers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1) for m in (model, twin)]
    report = fuse(twin)
    expected, actual = everything(model, x), everything(twin, x)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= FLOAT32_BOUND, name
    for step in range(3):
        for m, optimiser in zip((model, twin), optimisers, strict=True):
            optimiser.zero_grad()
            torch.manual_seed(step)
            sum(output.square().mean() for output in tensors(m(x))).backward()
            optimiser.step()
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert relative_error(other, value) <= FLOAT32_BOUND, name
    return report


def check_bfloat16(model, x):
    """Under autocast, no further from float64 than twice the unfused model: root mean squares over three inputs."""
    model.eval()
    twin, exact_model = copy.deepcopy(model), copy.deepcopy(model).double()
    fuse(twin)
    squares = [collections.Counter(), collections.Counter()]
    for image in (x, x.flip(0, 3), -x):
        exact = everything(exact_model, image.double())
        with torch.autocast("cpu", torch.bfloat16):
            results = [everything(m, image) for m in (model, twin)]
        assert {k: v.dtype for k, v in results[1].items()} == {k: v.dtype for k, v in results[0].items()}
        for sums, result in zip(squares, results, strict=True):
            sums.update({k: relative_error(v, exact[k], 1e-3) ** 2 for k, v in result.items()})
    typical = sum(squares[0].values()) / len(squares[0])
    for name, square in squares[1].items():
        # A small tensor may come out right by luck: its own error counts only where it is not below the typical one.
        assert square <= 4 * max(squares[0][name], typical), name


class Logits(nn.Module):
    """A module whose output is the first tensor of another's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return tensors(self.model(x))[0]
