"""Every form of inputs and outputs, and what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from keras_support import BACKEND, array, config_of, error, images
from support import FLOAT32_BOUND

from convnext_fast import (
    ConvNextV2Config,
    TFConvNextForImageClassification,
    TFConvNextModel,
    TFConvNextV2ForImageClassification,
)
from convnext_fast.images.batch_feature import BatchFeature
from convnext_fast.models.outputs import ImageClassifierOutput

LABELS = np.array([0, 4, 2])
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    return TFConvNextForImageClassification(config_of())


def tensors(x):
    """x as a tensor of every framework there is."""
    yield x
    yield x.astype("float64")
    yield torch.from_numpy(x).requires_grad_()
    yield keras.ops.convert_to_tensor(x)
    if importlib.util.find_spec("tensorflow"):
        yield importlib.import_module("tensorflow").constant(x)
    if importlib.util.find_spec("jax"):
        yield importlib.import_module("jax.numpy").asarray(x)


def test_forms_of_inputs(model):
    x = images()
    expected = array(model(x).logits)
    for tensor in tensors(x):
        forms = [lambda t: model(t), lambda t: model(pixel_values=t), lambda t: model([t]), lambda t: model((t,))]
        forms += [lambda t: model({"pixel_values": t}), lambda t: model(BatchFeature(pixel_values=t))]
        forms += [
            lambda t: model(**BatchFeature(pixel_values=t)),
            lambda t: model({"pixel_values": t, "labels": LABELS}),
        ]
        for form in forms:
            assert np.array_equal(array(form(tensor).logits), expected)
    loss = array(model(x, labels=LABELS).loss)
    assert loss.shape == (3,)
    assert np.array_equal(array(model({"pixel_values": x, "labels": torch.from_numpy(LABELS)}).loss), loss)


def test_forms_of_outputs(model):
    output = model(images(), labels=LABELS, output_hidden_states=True)
    assert isinstance(output, ImageClassifierOutput)
    assert list(output) == ["loss", "logits", "hidden_states"]
    assert output.logits is output["logits"] is output[1]
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 8, 8, 10), (3, 8, 8, 10), (3, 16, 4, 5)]
    flat = model(images(), labels=LABELS, output_hidden_states=True, return_dict=False)
    expected = (output.loss, output.logits, *output.hidden_states)
    assert isinstance(flat, tuple)
    assert [array(a).tolist() for a in flat] == [array(b).tolist() for b in expected]
    assert len(model(images(), return_dict=False)) == 1
    assert model(images()).loss is None


def test_configuration_asks_for_outputs():
    config = config_of(output_hidden_states=True, return_dict=False)
    flat = TFConvNextModel(config)(images())
    assert [tuple(t.shape) for t in flat][:2] == [(3, 16, 4, 5), (3, 16)]
    assert len(flat) == 5


def test_outputs_are_trees(model):
    output = model(images(), labels=LABELS, output_hidden_states=True)
    maps = [keras.tree.map_structure]
    if BACKEND == "tensorflow":
        maps.append(importlib.import_module("tensorflow").nest.map_structure)
    if BACKEND == "jax":
        maps.append(importlib.import_module("jax").tree.map)
    for function in maps:
        doubled = function(lambda t: 2 * t, output)
        assert isinstance(doubled, ImageClassifierOutput)
        assert list(doubled) == list(output)
        assert np.array_equal(array(doubled.logits), 2 * array(output.logits))
        assert len(doubled.hidden_states) == 3


def test_functional_models(model):
    image = keras.Input((3, 32, 40), name="pixel_values")
    logits = model(image).logits
    program = keras.Model(image, keras.layers.Softmax()(logits))
    x = images()
    assert error(program(x), keras.ops.softmax(model(x).logits)) < FLOAT32_BOUND
    named = keras.Model({"pixel_values": image}, dict(model({"pixel_values": image})))
    assert error(named({"pixel_values": x})["logits"], model(x).logits) < FLOAT32_BOUND


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ({}, ValueError, "no pixel_values"),
        ({"pixel_values": images()[0]}, ValueError, r"shape \(3, 32, 40\): expected \(N, 3, H, W\)"),
        ({"pixel_values": images(channels=1)}, ValueError, r"expected \(N, 3, H, W\)"),
        ({"pixel_values": images(size=(7, 40))}, ValueError, "7×40 pixels: expected at least 8×8"),
        ({"pixel_values": images().astype("uint8")}, TypeError, "uint8.*expected floats"),
        ({"pixel_values": "cat.jpg"}, TypeError, "a str: expected a tensor"),
        ({"pixel_values": [images(), images()]}, ValueError, r"a list of 2: expected \[pixel_values\]"),
        (
            {"pixel_values": {"pixel_values": images(), "mask": images()}},
            ValueError,
            "hold mask: expected pixel_values",
        ),
        ({"pixel_values": images(), "labels": np.array([0, 1, 5])}, ValueError, "hold 5: expected class indices"),
        ({"pixel_values": images(), "labels": np.array([0, 1, -1])}, ValueError, "hold -1: expected class indices"),
        ({"pixel_values": images(), "labels": np.array([[0, 1], [1, 1], [0, 0]])}, ValueError, r"expected \(N,\)"),
        ({"pixel_values": images(), "labels": np.ones((3, 4), "float32")}, ValueError, r"expected \(N, 5\)"),
    ],
)
def test_bad_inputs_are_refused(model, inputs, kind, message):
    with pytest.raises(kind, match=message):
        model(**inputs)


def test_bad_configuration_is_refused():
    for config in ({}, ConvNextV2Config()):
        with pytest.raises(TypeError, match=f"config is a {type(config).__name__}.*expected .*ConvNextConfig"):
            TFConvNextModel(config)
    with pytest.raises(TypeError, match=r"expected a convnext_fast\.ConvNextV2Config"):
        TFConvNextV2ForImageClassification(config_of())
    with pytest.raises(ValueError, match="hold labels: expected pixel_values"):
        TFConvNextModel(config_of())({"pixel_values": images(), "labels": LABELS})


def test_number_of_parameters(model):
    assert model.num_parameters() == sum(array(v).size for v in model.weights)
    model.classifier.trainable = False
    assert model.num_parameters() - model.num_parameters(only_trainable=True) == 16 * 5 + 5
    model.classifier.trainable = True


@pytest.mark.skipif(BACKEND == "torch", reason="the package itself needs PyTorch")
def test_a_missing_backend_is_named():
    code = f"import sys; sys.modules['{BACKEND}'] = None\nimport convnext_fast; convnext_fast.TFConvNextModel"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert f"ImportError: the TFConvNext classes need Keras's backend {BACKEND}" in result.stderr
    assert "KERAS_BACKEND=torch or jax" in result.stderr


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the examples are TensorFlow's")
def test_examples_of_the_page(tmp_path):
    """As transformers' page has them, from folders instead of the hub."""
    import PIL.Image
    import tensorflow as tf

    from convnext_fast import ConvNextImageProcessor

    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    ConvNextImageProcessor(size=32).save_pretrained(tmp_path)
    TFConvNextForImageClassification(config_of()).save_pretrained(tmp_path)

    image_processor = ConvNextImageProcessor.from_pretrained(tmp_path)
    model = TFConvNextModel.from_pretrained(tmp_path)
    inputs = image_processor(images=image, return_tensors="tf")
    outputs = model(**inputs)
    last_hidden_states = outputs.last_hidden_state
    assert last_hidden_states.shape == (1, 16, 4, 4)

    model = TFConvNextForImageClassification.from_pretrained(tmp_path)
    inputs = image_processor(images=image, return_tensors="tf")
    outputs = model(**inputs)
    logits = outputs.logits
    predicted_class_idx = tf.math.argmax(logits, axis=-1)[0]
    assert model.config.id2label[int(predicted_class_idx)].startswith("LABEL_")
