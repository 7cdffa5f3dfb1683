"""A frozen model whose weights change computes with the new ones, whatever changed them."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from fresh import python
from frozen_support import folded_weights
from support import no_worse, randomise, relative_error
from torch import nn
from weight_changes import LAYER_CHANGES, averages, changes_of, random_like

from convnext_fast import ConvNext, ConvNextConfig, ConvNextModel, ConvNextV2Config
from convnext_fast.backends import environment

HERE = Path(__file__).parent
CONFIG = ConvNextConfig(num_stages=2, hidden_sizes=[16, 24], depths=[2, 1], num_labels=5)
V2 = ConvNextV2Config(num_stages=2, hidden_sizes=[16, 24], depths=[2, 1], num_labels=5)
MODELS = {"V1": ConvNext, "V2": lambda _: ConvNext(V2), "theirs": ConvNextModel}


@pytest.fixture(params=["kernels", "aten"])
def backend(request, monkeypatch):
    """The kernels for CPUs, where there are any, and ATen's calls."""
    if request.param == "aten":
        monkeypatch.setattr(environment, "REQUEST", "aten")


def model_of(made=ConvNext, seed=0):
    return randomise(made(CONFIG), seed=seed).eval()


def image():
    return torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def output(model, dtype=torch.float32):
    y = model(image().to(dtype))
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


def check(model, got):
    """Against the plain model with the same parameters."""
    plain = copy.deepcopy(model)
    plain.fused = False
    eager = output(plain)
    assert no_worse(got, output(plain.double(), torch.float64), eager)


def places(model):
    """Holders and names of a depthwise convolution, a linear layer and a downsampling convolution."""
    if isinstance(model, ConvNext):
        first, second = model.stages
        return (first.blocks[1], "conv_dw"), (first.blocks[0].mlp, "fc1"), (second.downsample, "1")
    first, second = model.encoder.stages
    return (first.layers[1], "dwconv"), (first.layers[0], "pwconv1"), (second.downsampling_layer, "1")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("kind", "change", "backend"), changes_of(MODELS), indirect=["backend"])
def test_a_changed_layer_is_noticed(kind, change):
    torch.manual_seed(3)
    model = model_of(MODELS[kind]).freeze()
    for holder, name in places(model):
        before = output(model)
        LAYER_CHANGES[change](holder, name)
        after = output(model)
        assert relative_error(after, before) > 1e-3, name
        check(model, after)
        assert torch.equal(output(model), after)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("part", ["norm", "gamma", "stem"])
def test_affines_and_layer_scales_count(part):
    model = model_of().freeze()
    block = model.stages[0].blocks[1]
    parameter = {"norm": block.norm.bias, "gamma": block.gamma, "stem": model.stem[0].weight}[part]
    before = output(model)
    with torch.no_grad():
        parameter.add_(random_like(parameter))
    assert relative_error(output(model), before) > 1e-3
    check(model, output(model))


@pytest.mark.usefixtures("backend")
def test_a_block_called_by_itself_notices_too():
    model = model_of().freeze()
    block, x = model.stages[0].blocks[1], torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        before = block(x)
        block.mlp.fc1.weight.add_(1)
        after = block(x)
        model.unfreeze()
        assert relative_error(after, block(x)) <= 1e-5
    assert relative_error(after, before) > 1e-3


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", averages())
def test_averages(name):
    averaged = averages()[name](model_of())
    averaged.update_parameters(model_of())
    averaged.module.freeze()
    before = output(averaged.module)
    averaged.update_parameters(model_of(seed=1))
    after = output(averaged.module)
    assert relative_error(after, before) > 1e-3
    check(averaged.module, after)


@pytest.mark.usefixtures("backend")
def test_a_conversion_there_and_back_rounds():
    model = model_of().freeze()
    before = output(model)
    model.to(torch.bfloat16).float()
    assert relative_error(output(model), before) > 1e-4
    check(model, output(model))


@pytest.mark.usefixtures("backend")
def test_weights_without_a_version():
    """Weights made and changed in inference mode, where PyTorch counts no versions."""
    with torch.inference_mode():
        model = model_of().freeze()
        before = output(model)
        model.stages[0].blocks[1].mlp.fc1.weight.mul_(-1)
        after = output(model)
        assert relative_error(after, before) > 1e-3
        check(model, after)


def negate(model):
    model.stages[0].blocks[1].mlp.fc1.weight.detach().numpy()[:] *= -1


@pytest.mark.usefixtures("backend")
def test_what_leaves_no_trace_is_seen_after_freezing_again():
    """As `ConvNext.freeze` says."""
    model = model_of().freeze()
    before = output(model)
    negate(model)
    assert torch.equal(output(model), before)
    model.freeze()
    assert relative_error(output(model), before) > 1e-3
    check(model, output(model))
    model.unfreeze()
    negate(model)
    model.freeze()
    assert torch.equal(output(model), before)


@pytest.mark.parametrize(
    ("made", "change"),
    [
        (ConvNext, "layer replaced"),
        (ConvNext, "data assigned"),
        (ConvNextModel, "add_"),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (
                (ConvNext, "parameter swapped"),
                (ConvNext, "add_"),
                (ConvNext, "SGD, fused"),
                (ConvNextModel, "layer replaced"),
            )
        ),
    ],
)
def test_compiled_models_notice(made, change):
    torch.manual_seed(3)
    model = model_of(made).freeze()
    compiled = torch.compile(model, backend="aot_eager")
    for holder, name in places(model):
        before = output(compiled)
        LAYER_CHANGES[change](holder, name)
        after = output(compiled)
        assert relative_error(after, before) > 1e-3, name
        check(model, after)


def test_a_change_folds_the_changed_block_alone():
    model = model_of().freeze()
    output(model)
    blocks = model.blocks()
    before = list(map(folded_weights, blocks))
    with torch.no_grad():
        blocks[1].norm.weight.add_(1)
    output(model)
    after = list(map(folded_weights, blocks))
    assert [old is new for old, new in zip(before, after, strict=True)] == [True, False, True]


def test_replaced_weights_are_not_kept():
    model = model_of().freeze()
    block = model.stages[0].blocks[1]
    for _ in range(3):
        before = weakref.ref(block.mlp.fc1.weight)
        block.mlp.fc1 = nn.Linear(16, 64).requires_grad_(False)
        output(model)
        assert before() is None


def test_freed_with_its_last_reference():
    """Without the garbage collector: a model's state holds no reference cycle."""
    gc.collect()
    gc.disable()
    try:
        model = model_of().freeze()
        output(model)
        model.unfreeze()
        output(model)
        watched = [weakref.ref(p) for p in model.parameters()]
        del model
        assert not any(reference() is not None for reference in watched)
    finally:
        gc.enable()


def test_copies_notice_their_own_changes_alone():
    model = model_of().freeze()
    before = output(model)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), before)
    with torch.no_grad():
        twin.stages[0].blocks[0].gamma.mul_(-1)
    assert relative_error(output(twin), before) > 1e-3
    assert torch.equal(output(model), before)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_functional_call_with_other_parameters():
    model = model_of().freeze()
    before = output(model)
    other = dict(model_of(seed=1).named_parameters())
    with torch.no_grad():
        got = torch.func.functional_call(model, other, image())
    assert relative_error(got, output(model_of(seed=1))) <= 1e-5
    assert torch.equal(output(model), before)


def test_trained_weights_count_without_gradients_too():
    """Frozen, then trained again by hand: calls without gradients use the trained weights."""
    model = model_of().freeze()
    output(model)
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.data.mul_(-1.1)
    check(model, output(model))


def test_a_frozen_model_that_another_process_saved(tmp_path):
    """Writes are counted from the first folding of weights on, not from a call of freeze on."""
    torch.save(model_of().freeze(), tmp_path / "model.pt")
    code = f"""
import sys
sys.path[:0] = {str(HERE)!r}, {str(HERE.parent)!r}
import torch
from test_changed_weights import check, output
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
output(model)
for parameter in model.parameters():
    parameter.data.mul_(-1.1)
check(model, output(model))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
