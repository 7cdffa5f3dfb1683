"""Outputs and gradients equal those of the PyTorch models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from keras_support import array, error, gradients, images, random_model, twins
from support import FLOAT32_BOUND

from convnext_fast import TFConvNextV2ForImageClassification

CASES = {
    "plain": {},
    "no layer scale": {"layer_scale_init_value": 0.0},
    "no blocks in a stage": {"depths": (0, 1)},
    "other sizes": {"hidden_sizes": (6, 9), "patch_size": (2, 4), "num_channels": 1, "norm_eps": 1e-3},
    "no labels": {"num_labels": 0},
    **{act: {"hidden_act": act} for act in ("gelu_new", "relu", "silu", "selu")},
    "V2": {"version": 2},
    "V2, other sizes": {"version": 2, "hidden_sizes": (6, 9), "patch_size": (2, 4), "hidden_act": "silu"},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_outputs_and_gradients(fields, tmp_path):
    compare(*twins(tmp_path, **fields))


def test_a_unit_that_is_zero_in_every_pixel(tmp_path):
    """Its norm, 0, has the gradient 0."""
    model = random_model(2)
    model.convnextv2.encoder.stages[1].layers[0].pwconv1.bias.data[3] = -1000.0
    model.save_pretrained(tmp_path)
    compare(model, TFConvNextV2ForImageClassification.from_pretrained(tmp_path))


def compare(model, keras_model):
    x = images(channels=model.config.num_channels)
    expected = model.double()(torch.from_numpy(x).double().requires_grad_(), output_hidden_states=True)
    found = keras_model(x, output_hidden_states=True)
    assert error(found.logits, expected.logits) < FLOAT32_BOUND
    assert len(found.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert error(ours, theirs) < FLOAT32_BOUND

    cotangent = np.random.default_rng(2).standard_normal(found.logits.shape).astype("float32")
    image = torch.from_numpy(x).double().requires_grad_()
    (model(image).logits * torch.from_numpy(cotangent)).sum().backward()
    of_image, of_weights = gradients(keras_model, x, cotangent)
    assert error(of_image, image.grad) < FLOAT32_BOUND
    parameters = dict(model.named_parameters())
    assert of_weights.keys() == parameters.keys()
    errors = {name: error(grad, parameters[name].grad) for name, grad in of_weights.items()}
    assert max(errors.values()) < FLOAT32_BOUND, errors


@pytest.mark.parametrize("version", [1, 2])
def test_model_without_classifier(version, tmp_path):
    model, keras_model = twins(tmp_path, headless=True, version=version)
    x = images()
    expected, found = model(torch.from_numpy(x)), keras_model(x)
    assert error(found.last_hidden_state, expected.last_hidden_state) < FLOAT32_BOUND
    assert error(found.pooler_output, expected.pooler_output) < FLOAT32_BOUND
    assert list(found) == ["last_hidden_state", "pooler_output"]
    without = type(keras_model).from_pretrained(tmp_path, add_pooling_layer=False)
    assert np.array_equal(array(without(x).last_hidden_state), array(found.last_hidden_state))
    assert without(x).pooler_output is None
    assert list(without(x)) == ["last_hidden_state"]
