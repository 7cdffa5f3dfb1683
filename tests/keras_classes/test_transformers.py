"""Transformers' own TensorFlow classes beside ours: outputs, losses, gradients, and each other's files."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
import torch
from keras_support import CLASSES, ON_TENSORFLOW, array, config_of, error, images, random_model

if not ON_TENSORFLOW or int(importlib.metadata.version("transformers").partition(".")[0]) > 4:
    pytest.skip("needs the TensorFlow backend and transformers 4: .ci/keras has them", allow_module_level=True)

import tensorflow as tf
import transformers

X, LABELS = images(3, size=(32, 40)), np.array([0, 4, 2])


def theirs_of(folder, version, headless=False):
    """Their model with random weights, which it has saved into the folder."""
    config = {**config_of(version, layer_scale_init_value=0.5).to_dict(), "architectures": None}
    kind = transformers.ConvNextConfig if version == 1 else transformers.ConvNextV2Config
    theirs = getattr(transformers, CLASSES[version, headless][1].__name__)(kind.from_dict(config))
    theirs(X)
    rng = np.random.default_rng(0)
    for variable in theirs.weights:
        fan = np.prod(variable.shape[:-1]) if len(variable.shape) > 1 else 1
        variable.assign(rng.standard_normal(variable.shape) / fan**0.5)
    theirs.save_pretrained(folder)
    return theirs


def by_name(model, gradients):
    return {v.name.partition("/")[2]: np.asarray(g) for v, g in zip(model.trainable_variables, gradients, strict=True)}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("return_dict", [True, False])
def test_classifier(return_dict, version, tmp_path):
    theirs = theirs_of(tmp_path, version)
    ours = CLASSES[version, False][1].from_pretrained(tmp_path)
    options = {"labels": LABELS, "output_hidden_states": True, "return_dict": return_dict}
    expected, found = theirs(X, **options), ours(X, **options)
    if return_dict:
        assert list(found) == list(expected)
        found, expected = ((o.loss, o.logits, *o.hidden_states) for o in (found, expected))
    assert len(found) == len(expected)
    assert max(error(a, b.numpy()) for a, b in zip(found, expected, strict=True)) < 1e-5
    image = tf.constant(X)
    gradients = []
    for model in (theirs, ours):
        variables = [variable if model is theirs else variable.value for variable in model.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(image)
            loss = tf.reduce_mean(model(image, labels=LABELS).loss)
        first, *rest = tape.gradient(loss, [image, *variables])
        gradients.append((first, rest))
    assert error(gradients[1][0], gradients[0][0].numpy()) < 1e-5
    expected = by_name(theirs, gradients[0][1])
    for variable, gradient in zip(ours.trainable_variables, gradients[1][1], strict=True):
        name = variable.path.partition("/")[2]
        for part in ("stages", "layers", "downsampling_layer"):
            name = name.replace(f"{part}_", f"{part}.")
        reference = expected.pop(f"{name}:0")
        assert error(array(gradient).reshape(reference.shape), reference) < 1e-5, name
    assert not expected


@pytest.mark.parametrize("version", [1, 2])
def test_model(version, tmp_path):
    theirs = theirs_of(tmp_path, version, headless=True)
    ours = CLASSES[version, True][1].from_pretrained(tmp_path)
    for options in ({}, {"output_hidden_states": True, "return_dict": False}):
        expected, found = theirs(X, **options), ours(X, **options)
        pairs = zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True)
        assert max(error(a, b.numpy()) for a, b in pairs) < 1e-5


@pytest.mark.parametrize("size", ["5GB", "5KB"])
@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("safe", [False, True])
def test_they_load_what_we_save(safe, version, headless, size, tmp_path):
    random_model(version, headless).save_pretrained(tmp_path / "pytorch")
    cls = CLASSES[version, headless][1]
    ours = cls.from_pretrained(tmp_path / "pytorch")
    ours.save_pretrained(tmp_path / "ours", safe_serialization=safe, max_shard_size=size)
    assert len(list((tmp_path / "ours").glob("*.index.json"))) == (size == "5KB")
    theirs, info = getattr(transformers, cls.__name__).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert error(theirs(X)[0], array(ours(X)[0])) < 1e-5


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("safe", [False, True])
def test_we_load_what_they_save_in_parts(safe, version, tmp_path):
    theirs = theirs_of(tmp_path / "whole", version)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="5KB", safe_serialization=safe)
    assert list((tmp_path / "parts").glob("*.index.json"))
    pytorch, ours = (cls.from_pretrained(tmp_path / "parts") for cls in CLASSES[version, False])
    assert error(ours(X).logits, theirs(X).logits.numpy()) < 1e-5
    assert error(pytorch(torch.from_numpy(X)).logits, theirs(X).logits.numpy()) < 1e-5
