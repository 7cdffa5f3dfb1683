"""compile, fit, evaluate and predict; precision, drop path, freezing, LoRA and quantised weights."""

from __future__ import annotations

import importlib.util

import keras
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keras_support import ON_TORCH, array, config_of, error, images, in_pytorch, twins
from support import FLOAT32_BOUND

from convnext_fast import TFConvNextForImageClassification, TFConvNextModel

LABELS = np.array([0, 4, 2, 1])
X = images(4)


def weights_of(model):
    return {
        name: value.copy() for name, value in in_pytorch(model, [array(v) for v in model.trainable_variables]).items()
    }


def step_of_pytorch(model, weight=1.0):
    """The weights after a step of plain SGD on the mean of the weighted losses."""
    losses = F.cross_entropy(model(torch.from_numpy(X)).logits, torch.from_numpy(LABELS), reduction="none")
    (losses * torch.as_tensor(weight)).mean().backward()
    return {name: (p - 0.1 * p.grad).detach().numpy() for name, p in model.named_parameters()}


FORMS = {
    "a tuple": ((X, LABELS), {}),
    "labels among the inputs": (({"pixel_values": X, "labels": LABELS},), {}),
    "labels by name": (({"pixel_values": X}, {"labels": LABELS}), {}),
    "an output by name": ((X, {"logits": LABELS}), {}),
    "a loss": ((X, LABELS), {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}),
    "a loss by name": (
        ({"pixel_values": X}, {"logits": LABELS}),
        {"loss": {"logits": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}},
    ),
    "metrics": ((X, LABELS), {"metrics": ["accuracy"]}),
    "metrics by name": ((X, LABELS), {"metrics": {"logits": ["accuracy"]}}),
}


@pytest.mark.parametrize(("data", "options"), FORMS.values(), ids=FORMS)
def test_a_step_of_training_is_pytorchs(data, options, tmp_path):
    model, keras_model = twins(tmp_path)
    keras_model.compile(optimizer=keras.optimizers.SGD(0.1), **options)
    history = keras_model.fit(*data, batch_size=4, verbose=0).history
    expected, found = step_of_pytorch(model), weights_of(keras_model)
    assert max(error(found[name], value) for name, value in expected.items()) < 1e-5
    result = keras_model.evaluate(*data, verbose=0, return_dict=True)
    assert result["loss"] != history["loss"][0]
    if "metrics" in options:
        (name,) = set(result) - {"loss"}
        assert name.endswith("accuracy")
        assert result[name] == (array(keras_model(X).logits).argmax(1) == LABELS).mean()


def test_a_loss_of_the_user(tmp_path):
    _, model = twins(tmp_path)
    model.compile(optimizer="sgd", loss=lambda labels, logits: keras.ops.sum(logits, axis=1))
    expected = array(model(X).logits).sum(1).mean()
    assert model.evaluate(X, LABELS, verbose=0) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_weights_of_samples(tmp_path):
    model, keras_model = twins(tmp_path)
    weight = np.array([1.0, 0.0, 2.0, 0.5], "float32")
    keras_model.compile(optimizer=keras.optimizers.SGD(0.1))
    keras_model.fit(X, LABELS, batch_size=4, verbose=0, sample_weight=weight)
    expected, found = step_of_pytorch(model, weight), weights_of(keras_model)
    assert max(error(found[name], value) for name, value in expected.items()) < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs tensorflow")
def test_datasets_of_tensorflow(tmp_path):
    import tensorflow as tf

    _, model = twins(tmp_path)
    model.compile(optimizer="sgd")
    data = tf.data.Dataset.from_tensor_slices({"pixel_values": X, "labels": LABELS}).batch(2)
    expected = model.evaluate(X, LABELS, verbose=0)
    assert model.evaluate(data, verbose=0) == pytest.approx(expected, rel=1e-5)
    model.fit(data, verbose=0)


def test_predict(tmp_path):
    _, model = twins(tmp_path, output_hidden_states=True)
    found = model.predict(X, batch_size=3, verbose=0)
    expected = model(X)
    assert error(found.logits, expected.logits) < FLOAT32_BOUND
    assert [state.shape for state in found.hidden_states] == [tuple(s.shape) for s in expected.hidden_states]


def test_training_without_classifier(tmp_path):
    _, model = twins(tmp_path, headless=True)
    model.compile(optimizer="sgd", loss={"pooler_output": "mse"})
    target = np.zeros((4, 16), "float32")
    expected = (array(model(X).pooler_output) ** 2).mean()
    assert model.evaluate(X, {"pooler_output": target}, verbose=0) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"targets for \['logits'\]"):
        model.evaluate(X, {"logits": target}, verbose=0)


def test_a_model_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64)
    x = rng.standard_normal((64, 3, 16, 16)).astype("float32") + labels[:, None, None, None]
    model = TFConvNextForImageClassification(config_of(num_labels=2, layer_scale_init_value=1.0))
    model.compile(optimizer=keras.optimizers.Adam(1e-2), metrics=["accuracy"])
    model.fit(x, labels, epochs=6, batch_size=16, verbose=0)
    assert model.evaluate(x, labels, verbose=0, return_dict=True)["accuracy"] > 0.9


def test_drop_path(tmp_path):
    model = TFConvNextForImageClassification(config_of(drop_path_rate=0.5, layer_scale_init_value=1.0))
    block = model.convnext.encoder.stages[1].layers[1]
    x = np.repeat(np.random.default_rng(0).standard_normal((1, 4, 4, 16)).astype("float32"), 64, 0)
    plain, branch = array(block(x)), array(block(x)) - x
    outcomes = array(block(x, training=True)) - x
    factors = (outcomes * branch).sum((1, 2, 3)) / (branch**2).sum((1, 2, 3))
    assert np.allclose(factors, np.round(factors / 2) * 2, atol=1e-4)
    assert 16 <= (factors > 1).sum() <= 48
    assert np.array_equal(array(block(x)), plain)
    draws = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        twin = TFConvNextForImageClassification(config_of(drop_path_rate=0.5, layer_scale_init_value=1.0))
        draws += [array(twin(X, training=True).logits), array(twin(X, training=True).logits)]
    assert np.array_equal(draws[0], draws[2])
    assert not np.array_equal(draws[0], draws[1])


def test_every_block_may_be_dropped():
    model = TFConvNextModel(config_of(depths=(1, 1), drop_path_rate=1.0))
    assert np.isfinite(array(model(X, training=True).pooler_output)).all()


def test_frozen_layers_stay(tmp_path):
    _, model = twins(tmp_path)
    model.convnext.trainable = False
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    before = [array(v) for v in model.weights]
    model.fit(X, LABELS, verbose=0)
    changed = [not np.array_equal(a, array(v)) for a, v in zip(before, model.weights, strict=True)]
    assert [v.path.rpartition("/")[0] for v, c in zip(model.weights, changed, strict=True) if c] == [
        f"{model.name}/classifier"
    ] * 2


@pytest.mark.parametrize(("policy", "bound"), [("mixed_bfloat16", 0.03), ("mixed_float16", 0.004), ("bfloat16", 0.03)])
def test_precision(policy, bound, tmp_path):
    model, _ = twins(tmp_path)
    low = TFConvNextForImageClassification.from_pretrained(tmp_path, dtype=policy)
    compute = policy.removeprefix("mixed_")
    output = low(X, labels=LABELS)
    assert keras.backend.standardize_dtype(output.logits.dtype) == compute
    assert {v.dtype for v in low.trainable_variables} == {"float32" if "mixed" in policy else compute}
    logits = array(keras.ops.cast(output.logits, "float32"))
    assert error(logits, model(torch.from_numpy(X)).logits) < bound
    low.compile(optimizer="sgd")
    assert np.isfinite(low.fit(X, LABELS, verbose=0).history["loss"][0])


def test_lora(tmp_path):
    _, model = twins(tmp_path)
    before, reference = array(model(X).logits), array(model(X[:1], output_hidden_states=True).hidden_states[0])
    for stage in model.convnext.encoder.stages:
        for block in stage.layers:
            block.pwconv1.enable_lora(2)
    model.convnext.embeddings.trainable = False
    assert error(model(X).logits, before) < FLOAT32_BOUND
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    model.fit(X, LABELS, verbose=0)
    after = array(model(X).logits)
    block = model.convnext.encoder.stages[0].layers[0]
    assert array(block.pwconv1.lora_kernel_b).any()
    assert error(after, before) > 100 * FLOAT32_BOUND
    assert np.array_equal(array(model(X[:1], output_hidden_states=True).hidden_states[0]), reference)
    # What is saved computes the same without LoRA.
    model.save_pretrained(tmp_path / "merged")
    merged = TFConvNextForImageClassification.from_pretrained(tmp_path / "merged")
    assert error(merged(X).logits, after) < FLOAT32_BOUND


def test_int8(tmp_path):
    _, model = twins(tmp_path)
    before = array(model(X).logits)
    model.quantize("int8")
    assert 0 < error(model(X).logits, before) < 0.1
    with pytest.raises(ValueError, match=r"quantised.*expected a model with plain weights"):
        model.save_pretrained(tmp_path / "int8")


@pytest.mark.skipif(not ON_TORCH, reason="PyTorch alone keeps the order of memory")
def test_kernels_lie_in_pytorchs_order(tmp_path):
    _, model = twins(tmp_path)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    model.fit(X, LABELS, verbose=0)
    block = model.convnext.encoder.stages[0].layers[0]
    assert block.pwconv1.kernel.value.t().is_contiguous()
    assert block.dwconv.kernel.value.permute(2, 3, 0, 1).is_contiguous()
    assert model.convnext.embeddings.patch_embeddings.kernel.value.permute(3, 2, 0, 1).is_contiguous()
