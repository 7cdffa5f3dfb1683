"""Traced models: the ONNX exporter that traces (``dynamo=False``) with dynamic axes, and `torch.jit.trace`."""

from __future__ import annotations

import io

import onnxruntime
import pytest
import torch
import transformers
from support import FLOAT32_BOUND, randomise, relative_error

import convnext_fast
from convnext_fast import fuse

SIZES = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
EXAMPLE, X = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 45, 70)


def theirs():
    return randomise(transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**SIZES))).eval()


def ours(name):
    return randomise(getattr(convnext_fast, name)(convnext_fast.ConvNextConfig(**SIZES))).eval()


def frozen(model):
    model.freeze()
    return model


def frozen_host():
    model = theirs()
    fuse(model).freeze()
    return model


MODELS = {
    "host": theirs,
    "fused host": lambda: fuse(theirs()).model,
    "frozen host": frozen_host,
    "ConvNext": lambda: ours("ConvNext"),
    "frozen ConvNext": lambda: frozen(ours("ConvNext")),
    "ConvNextModel": lambda: ours("ConvNextModel"),
    "classifier": lambda: ours("ConvNextForImageClassification"),
    "frozen classifier": lambda: frozen(ours("ConvNextForImageClassification")),
    "backbone": lambda: ours("ConvNextBackbone"),
}
models = pytest.mark.parametrize("name", MODELS)


def first(output):
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


# A host, a model of ours, and one with several results; the exporter traces the rest as `torch.jit.trace` does.
BY_DEFAULT = "frozen host", "ConvNext", "backbone"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.thorough) for name in MODELS]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_onnx_by_tracing(name):
    model, file = MODELS[name](), io.BytesIO()
    axes = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(model, (EXAMPLE,), file, dynamo=False, input_names=["pixel_values"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue())
    found = torch.from_numpy(session.run(None, {"pixel_values": X.numpy()})[0])
    assert relative_error(found, first(model(X))) <= FLOAT32_BOUND


@models
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_with_dictionaries(name):
    model = MODELS[name]()
    traced = torch.jit.trace(model, (EXAMPLE,), strict=False)(X)
    whole = model(X)
    assert isinstance(traced, dict) == isinstance(whole, dict)
    if isinstance(whole, dict):
        assert list(traced) == list(whole)
    assert relative_error(first(traced), first(whole)) <= FLOAT32_BOUND
