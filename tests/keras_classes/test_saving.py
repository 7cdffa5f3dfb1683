"""Keras's own files and programs: .keras, .weights.h5, SavedModel, TFLite and PyTorch's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from keras_support import BACKEND, ON_TENSORFLOW, ON_TORCH, array, error, images, twins
from support import FLOAT32_BOUND

ROOT = Path(__file__).resolve().parents[2]
X = images(3, size=(32, 32))
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("headless", [False, True])
def test_keras_files(headless, version, tmp_path):
    _, model = twins(tmp_path, headless, version=version, drop_path_rate=0.1)
    output = "pooler_output" if headless else "logits"
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss={output: "mse"})
    model.fit(X, {output: np.zeros(model(X)[output].shape, "float32")}, verbose=0)
    model.save(tmp_path / "model.keras")
    twin = keras.models.load_model(tmp_path / "model.keras")
    assert type(twin) is type(model)
    assert twin.config == model.config
    assert np.array_equal(array(twin(X)[output]), array(model(X)[output]))
    assert twin.optimizer.iterations == 1
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = type(model)(model.config)
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(array(fresh(X)[output]), array(model(X)[output]))


OTHERS = [b for b in ("torch", "jax", "tensorflow") if b != BACKEND and importlib.util.find_spec(b)]


@pytest.mark.parametrize("backend", OTHERS)
def test_keras_files_open_on_another_backend(backend, tmp_path):
    _, model = twins(tmp_path, drop_path_rate=0.1)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", X)
    code = (
        "import sys, keras, numpy as np, convnext_fast.keras\n"
        "model = keras.models.load_model(sys.argv[1] + '/model.keras')\n"
        "logits = model(np.load(sys.argv[1] + '/x.npy')).logits\n"
        "np.save(sys.argv[1] + '/y.npy', keras.ops.convert_to_numpy(logits))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "KERAS_BACKEND": backend}, cwd=ROOT, check=True
    )
    assert error(np.load(tmp_path / "y.npy"), model(X).logits) < FLOAT32_BOUND


@pytest.mark.skipif(ON_TORCH or not HAS_TENSORFLOW, reason="on PyTorch, Keras writes no SavedModel")
@pytest.mark.parametrize("version", [1, 2])
def test_saved_model_and_tflite(version, tmp_path):
    import tensorflow as tf

    _, model = twins(tmp_path, version=version)
    expected = array(model(X).logits)
    model.save_pretrained(tmp_path / "saved", saved_model=True)
    program = tf.saved_model.load(str(tmp_path / "saved" / "saved_model" / "1"))
    serve = program.signatures["serving_default"]
    assert list(serve.structured_input_signature[1]) == ["pixel_values"]
    found = serve(pixel_values=tf.constant(X))
    assert list(found) == ["logits"]
    assert error(found["logits"], expected) < FLOAT32_BOUND
    if not ON_TENSORFLOW:
        return
    shape = tf.TensorSpec(X.shape, tf.float32)
    static = tf.function(lambda pixel_values: {"logits": model(pixel_values).logits}).get_concrete_function(shape)
    for converter in (
        tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved" / "saved_model" / "1")),
        tf.lite.TFLiteConverter.from_concrete_functions([static]),
    ):
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        lite = tf.lite.Interpreter(model_content=converter.convert())
        lite.resize_tensor_input(lite.get_input_details()[0]["index"], X.shape)
        lite.allocate_tensors()
        lite.set_tensor(lite.get_input_details()[0]["index"], X)
        lite.invoke()
        assert error(lite.get_tensor(lite.get_output_details()[0]["index"]), expected) < FLOAT32_BOUND


@pytest.mark.skipif(not ON_TORCH, reason="only on PyTorch does Keras write PyTorch's programs")
@pytest.mark.parametrize("version", [1, 2])
def test_programs_of_pytorch(version, tmp_path):
    _, model = twins(tmp_path, version=version)
    batch = {0: torch.export.Dim("batch", min=1)}
    model.export(str(tmp_path / "model.pt2"), format="torch", verbose=False, dynamic_shapes=batch)
    program = torch.export.load(tmp_path / "model.pt2").module()
    found = program(torch.from_numpy(X))
    assert list(found) == ["logits"]
    assert error(found["logits"], model(X).logits) < FLOAT32_BOUND


@pytest.mark.skipif(not ON_TORCH, reason="PyTorch")
def test_saved_model_is_refused_on_pytorch(tmp_path):
    _, model = twins(tmp_path)
    with pytest.raises(ValueError, match=r"SavedModel.*TensorFlow or JAX"):
        model.save_pretrained(tmp_path / "saved", saved_model=True)
    assert not (tmp_path / "saved").exists()
