"""The losses, one for each sample, are PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keras_support import ON_JAX, ON_TENSORFLOW, array, error, images, twins
from support import FLOAT32_BOUND

CLASSES = np.array([0, -100, 4])
CASES = {
    "classes": ({}, CLASSES, lambda z, y: F.cross_entropy(z, y, reduction="none")),
    "a column of classes": ({}, CLASSES[:, None], lambda z, y: F.cross_entropy(z, y[:, 0], reduction="none")),
    "one label": ({"num_labels": 1}, np.array([0.5, -1, 2], "float32"), lambda z, y: (z[:, 0] - y) ** 2),
    "one label, integers": ({"num_labels": 1}, np.array([0, -1, 2]), lambda z, y: (z[:, 0] - y) ** 2),
    "regression": (
        {"problem_type": "regression"},
        np.arange(15.0, dtype="float32").reshape(3, 5),
        lambda z, y: ((z - y) ** 2).mean(1),
    ),
    "several labels": (
        {},
        np.eye(3, 5, dtype="float32"),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1),
    ),
}


@pytest.mark.parametrize(("fields", "labels", "expected"), CASES.values(), ids=CASES)
def test_losses(fields, labels, expected, tmp_path):
    model, keras_model = twins(tmp_path, **fields)
    x = images()
    found = keras_model(x, labels=labels).loss
    assert error(found, expected(model(torch.from_numpy(x)).logits, torch.from_numpy(labels))) < FLOAT32_BOUND
    # Training takes the mean of those that count, as PyTorch's model does.
    keras_model.compile(optimizer="sgd")
    mean = keras_model.evaluate(x, labels, verbose=0)
    kind = torch.int64 if labels.dtype == int and not fields else torch.float32
    reference = model(torch.from_numpy(x), labels=torch.from_numpy(labels).to(kind)).loss
    assert mean == pytest.approx(reference.item(), rel=1e-5)


def test_labels_out_of_range_are_nan_in_a_graph(tmp_path):
    _, model = twins(tmp_path)
    x, labels = images(), np.array([1, 7, 2])
    if ON_TENSORFLOW:
        import tensorflow as tf

        loss = tf.function(lambda x, y: model(x, labels=y).loss)(x, labels)
    elif ON_JAX:
        import jax

        loss = jax.jit(lambda x, y: model(x, labels=y).loss)(x, labels)
    else:
        pytest.skip("PyTorch reads the labels")
    assert np.isnan(array(loss)).tolist() == [False, True, False]


def test_no_labels_is_an_error(tmp_path):
    _, model = twins(tmp_path)
    model.compile(optimizer="sgd")
    with pytest.raises(ValueError, match="no labels: expected them in y"):
        model.fit(images(), verbose=0)


def test_floats_are_no_classes(tmp_path):
    _, model = twins(tmp_path, problem_type="single_label_classification")
    with pytest.raises(TypeError, match="expected integer class indices"):
        model(images(), labels=np.ones(3, "float32"))
