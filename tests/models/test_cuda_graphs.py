"""CUDA graphs: what is refused without a GPU, and values on one. `peers/test_cuda_graphs_hollow.py` counts launches."""

from __future__ import annotations

import copy

import pytest
import torch
from support import BOUNDS, randomise, relative_error
from torch import nn

from convnext_fast import ConvNext, ConvNextConfig, ConvNextForImageClassification, fuse, graphed
from convnext_fast.models.freezing import State, state_of

CONFIG = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 5}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


def model_of(made=ConvNext, **options):
    return randomise(made(ConvNextConfig(**CONFIG, **options)))


@pytest.mark.parametrize("made", [ConvNext, ConvNextForImageClassification])
def test_freezing_names_the_device_that_has_no_graphs(made):
    model = model_of(made).train()
    with pytest.raises(ValueError, match="the model is on cpu: expected it on a CUDA device"):
        model.freeze(cuda_graph=True)
    with pytest.raises(ValueError, match="the model is on cpu: expected it on a CUDA device"):
        fuse(model).freeze(cuda_graph=True)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_cuda_graph_lasts_until_the_next_freeze():
    model = model_of().freeze()
    stage = model.stages[1]
    stage._convnext_fast = State(state_of(stage).plan, (), cuda_graph=True)
    assert state_of(copy.deepcopy(model).stages[1]).cuda_graph
    stage.fused = True  # sets the plan
    assert state_of(stage).cuda_graph
    model.freeze()
    assert not state_of(stage).cuda_graph


def test_graphed_refuses_what_it_cannot_capture():
    model, x = model_of().train(), torch.randn(2, 3, 32, 32)
    with pytest.raises(TypeError, match=r"model is a function: expected a torch\.nn\.Module"):
        graphed(lambda x: x, x)
    with pytest.raises(TypeError, match="example is a list: expected a tensor"):
        graphed(model, [x])
    with pytest.raises(ValueError, match="the model is on cpu: expected one CUDA device"):
        graphed(model, x)
    with pytest.raises(ValueError, match="the model is on no device: expected one CUDA device"):
        graphed(nn.Identity(), x)
    hook = model.stages[1].blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"hooks on stages\.1\.blocks\.0\.mlp\.fc1, which a graph does not call"):
        graphed(model, x)
    hook.remove()
    with pytest.raises(ValueError, match="the model is in evaluation mode"):
        graphed(model.eval(), x)
    with pytest.raises(ValueError, match="stem is frozen: expected a model to train"):
        graphed(model.freeze(), x)


@on_gpu
@torch.no_grad()
def test_replays_of_a_frozen_model_compute_the_same():
    model = model_of().cuda().freeze(cuda_graph=True)
    plain = copy.deepcopy(model).freeze()
    for seed in range(6):
        x = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(seed)).cuda()
        assert torch.equal(model(x), plain(x))
        if seed == 3:
            for each in (model, plain):
                each.stem[0].weight.data = 2 * each.stem[0].weight.data
                each.stages[1].blocks[0].mlp.fc1.weight.mul_(2)


@on_gpu
def test_replays_of_a_training_step_compute_the_same():
    plain, x = model_of().cuda().train(), torch.randn(2, 3, 32, 40).cuda()
    model = graphed(copy.deepcopy(plain), x)
    for step in range(4):
        x = torch.randn_like(x)
        for each in (model, plain):
            if step == 2:  # the others accumulate
                each.zero_grad()
            each(x).square().sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert relative_error(one.grad, other.grad) <= BOUNDS[torch.float32]


@on_gpu
def test_each_replay_drops_other_samples():
    model, x = model_of(drop_path_rate=0.5).cuda().train(), torch.randn(16, 3, 32, 32).cuda()
    graphed(model, x)
    torch.manual_seed(0)
    first, second = model(x), model(x)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, model(x))
