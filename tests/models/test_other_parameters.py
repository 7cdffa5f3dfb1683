"""A frozen model uses other parameters however it gets them: our models of both versions, and hosts of `fuse`."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from fuse_support import one_thread  # noqa: F401
from other_parameters import WAYS, check_way, frozen, output
from support import no_worse

import convnext_fast
from convnext_fast.backends import environment

SIZES = {"num_stages": 2, "hidden_sizes": [16, 24], "depths": [2, 1], "num_labels": 5}
MODELS = {
    "V1": lambda: convnext_fast.ConvNext(convnext_fast.ConvNextConfig(**SIZES)),
    "V2": lambda: convnext_fast.ConvNext(convnext_fast.ConvNextV2Config(**SIZES)),
    "transformers V1": lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**SIZES)),
    "transformers V2": lambda: transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**SIZES)),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("model", "backend"), [*((model, "cpu") for model in MODELS), ("V1", "aten"), ("V2", "aten")])
def test_other_parameters_are_honoured(model, name, backend, monkeypatch):
    if backend == "aten":
        monkeypatch.setattr(environment, "REQUEST", "aten")
    check_way(name, MODELS[model])


def test_compiled_models_see_writes_into_data():
    x, model = torch.randn(2, 3, 64, 64), frozen(MODELS["V1"])
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        output(compiled, x)
    for parameter in model.parameters():
        parameter.data.mul_(-1.1)
    got, twin = output(compiled, x), copy.deepcopy(model)
    twin.fused = False
    assert no_worse(got, output(twin.double(), x.double()), output(twin.float(), x))
