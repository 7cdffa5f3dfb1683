"""Layers that were replaced or changed run as Keras runs them, not by the fused ops, which would ignore the change."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras_support import CLASSES, ON_TORCH, array, config_of, error, images
from support import FLOAT32_BOUND

from convnext_fast import TFConvNextForImageClassification
from convnext_fast.keras import fused

pytestmark = pytest.mark.skipif(not ON_TORCH, reason="the fused ops run on PyTorch alone")
X = images(2)


def places(model):
    """(place, owner, layer) of every layer that the fused ops stand for, one of each place."""
    embeddings, stage = model.main_layer.embeddings, model.main_layer.encoder.stages[1]
    block = stage.layers[0]
    for name in ("dwconv", "layernorm", "pwconv1", "pwconv2"):
        yield name, block, getattr(block, name)
    if block.grn is not None:
        yield "grn", block, block.grn
    for name in ("patch_embeddings", "layernorm"):
        yield f"stem {name}", embeddings, getattr(embeddings, name)
    for i, name in enumerate(("norm", "conv")):
        yield f"downsampling {name}", stage, stage.downsampling_layer[i]


def model_of(version=1):
    return CLASSES[version, False][1](config_of(version, layer_scale_init_value=1.0))


PLACES = [(version, name) for version in (1, 2) for name, _, _ in places(model_of(version))]


def of_class(layer):
    kind = type(layer)
    layer.__class__ = type("Positive", (kind,), {"call": lambda self, x: keras.ops.abs(kind.call(self, x))})


def of_call(layer):
    own = layer.call
    layer.call = lambda x: keras.ops.abs(own(x))


def of_activation(layer):
    layer.activation = keras.ops.abs


def of_bias(layer):
    layer.bias.assign(keras.ops.ones_like(layer.bias))
    layer.use_bias, layer.bias = False, None


def of_scale(layer):
    layer.gamma = keras.ops.full_like(layer.gamma, 0.5)
    layer.scale = layer.center = False
    layer.beta = None


def of_hook(layer):
    layer.register_forward_hook(lambda module, arguments, output: keras.ops.abs(output))


def of_policy(layer):
    layer.dtype_policy = "mixed_bfloat16"


ANY = [of_class, of_call, of_policy, of_hook]
CASES = [
    (version, place, change)
    for version, place in PLACES
    if version == 1 or place == "grn"
    for change in ANY + ([of_scale] if "norm" in place else [] if place == "grn" else [of_activation, of_bias])
]


@pytest.mark.parametrize(("version", "place", "change"), CASES)
def test_changes_have_their_effect(version, place, change, monkeypatch):
    model = model_of(version)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.standard_normal(variable.shape) * 0.3)
    layer = next(layer for name, _, layer in places(model) if name == place)
    before = array(model(X).logits)
    layer._tracker.unlock()
    change(layer)
    after = array(model(X).logits)
    monkeypatch.setattr(fused, "ON_TORCH", False)
    difference = error(after, model(X).logits)
    assert difference < FLOAT32_BOUND
    assert error(after, before) > 10 * difference


@pytest.mark.parametrize(
    "options", [{"use_bias": False}, {"activation": "relu", "bias_initializer": keras.initializers.Constant(-1)}]
)
def test_a_replaced_linear_layer(options):
    model = model_of()
    block = model.convnext.encoder.stages[1].layers[0]
    other = keras.layers.Dense(16, **options)
    other.build((None, None, None, 64))
    other.kernel.assign(keras.ops.zeros_like(other.kernel))
    block._tracker.unlock()
    block.pwconv2 = other
    x = np.ones((1, 4, 4, 16), "float32")
    assert np.array_equal(array(block(x)), x)


def test_unchanged_layers_run_by_the_ops(monkeypatch):
    model, seen = model_of(), []
    serves = fused.serves
    monkeypatch.setattr(fused, "serves", lambda *layers: seen.append(serves(*layers)) or seen[-1])
    model(X)
    mixed = TFConvNextForImageClassification(config_of(), dtype="mixed_bfloat16")
    mixed(X)
    model_of(2)(X)
    assert seen == [True] * 15
