"""Compiled frozen models: one operator for all steps, and changes of the modules are noticed."""

import copy
import pickle

import pytest
import torch
from sequence_support import (
    CONFIG,
    KINDS,
    WHOLE,
    blocks_of,
    check,
    downsampling,
    dwconv_of,
    in_turn,
    needs_kernels,
    output,
    stem_of,
)
from support import randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_fast import ConvNext, ConvNextModel
from convnext_fast.models.freezing import unfreeze

pytestmark = needs_kernels
thorough = pytest.mark.thorough


@pytest.mark.parametrize("model", [pytest.param(ConvNext, marks=thorough), ConvNextModel], indirect=True)
def test_a_compiled_model_calls_one_operator(model, chains):
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        compiled_model = torch.compile(model, fullgraph=True)
        check(output(compiled_model, x), model, x)
        x = torch.randn(3, 3, 48, 36)
        check(output(compiled_model, x), model, x)
    assert chains == [WHOLE] * 2


def test_after_dynamo_gave_up_the_code_of_a_model(model):
    """It then compiles the frames within, and would compile the steps' bookkeeping in pieces."""
    x = torch.randn(1, 3, 32, 32)
    with FlopCounterMode(display=False):
        output(torch.compile(copy.deepcopy(model), backend="aot_eager"), x)
    list(blocks_of(model, 1)[0].parameters())[-1].requires_grad_()
    compiled_model = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        check(output(compiled_model, x).detach(), model, x)


class OtherNorm(nn.LayerNorm):
    """A layer that replaces one of ours."""


def dilate(model):
    conv = dwconv_of(blocks_of(model, 0)[1])
    conv.dilation, conv.padding = (2, 2), (6, 6)


def replace(model):
    name = "norm" if isinstance(model, ConvNext) else "layernorm"
    setattr(blocks_of(model, 0)[1], name, randomise(OtherNorm(16), seed=5))


def stop_fusing(model):
    blocks_of(model, 0)[1].fused = False


def stride_of_the_stem(model):
    next(stem_of(model).children()).stride = (2, 2)


class Negation(nn.Module):
    def forward(self, x):
        return -x


def append_to_the_stem(model):
    stem_of(model).add_module("more", Negation())


def append_to_a_downsampling_layer(model):
    downsampling(model).add_module("more", Negation())


def unfreeze_a_block(model):
    unfreeze(blocks_of(model, 0)[1])


# Of a layer's setting, of a layer, of the plan, of a pair.
CHANGES = in_turn((dilate, replace, unfreeze_a_block, append_to_the_stem, append_to_a_downsampling_layer))
CHANGES += [pytest.param(kind, do, marks=thorough) for kind in KINDS for do in (stop_fusing, stride_of_the_stem)]


@pytest.mark.parametrize(("model", "do"), CHANGES, indirect=["model"])
def test_a_compiled_model_notices_changes(model, chains, do):
    x = torch.randn(2, 3, 40, 40)
    compiled_model = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        check(output(compiled_model, x), model, x)
        assert chains == [WHOLE]
        do(model)
        check(output(compiled_model, x), model, x)
        assert WHOLE not in chains[1:]


@pytest.mark.parametrize("keep", [True, False])
def test_models_of_one_kind_share_a_graph(keep):
    """Also models that are unpickled or copied."""
    torch._dynamo.utils.counters.clear()
    x, kept = torch.randn(2, 3, 40, 40), []
    for seed in range(10):
        model = randomise(ConvNext(CONFIG), seed=seed).eval().freeze()
        if seed % 3:
            model = copy.deepcopy(model) if seed % 3 == 1 else pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            check(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model, x)
        if keep:
            kept.append(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
