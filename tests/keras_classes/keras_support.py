"""What the tests of the Keras classes share: twins in PyTorch and Keras, and gradients on any backend."""

from __future__ import annotations

import keras
import numpy as np
import torch
from support import randomise

from convnext_fast import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    TFConvNextForImageClassification,
    TFConvNextModel,
)
from convnext_fast.keras.weights import _named

BACKEND = keras.backend.backend()
FIELDS = {"num_stages": 2, "hidden_sizes": (8, 16), "depths": (1, 2), "num_labels": 5, "image_size": 32}
ON_TORCH, ON_JAX, ON_TENSORFLOW = (name == BACKEND for name in ("torch", "jax", "tensorflow"))


def config_of(**fields):
    return ConvNextConfig(**{**FIELDS, **fields})


def twins(folder, headless=False, options=(), **fields):
    """The same random model in PyTorch and in Keras."""
    ours, theirs = (
        (ConvNextModel, TFConvNextModel)
        if headless
        else (
            ConvNextForImageClassification,
            TFConvNextForImageClassification,
        )
    )
    model = randomise(ours(config_of(**fields))).eval()
    model.save_pretrained(folder)
    return model, theirs.from_pretrained(folder, **dict(options))


def images(count=3, size=(32, 40), channels=3):
    return np.random.default_rng(1).standard_normal((count, channels, *size)).astype("float32")


def array(value):
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(value)))


def error(actual, expected):
    """‖actual − expected‖ / ‖expected‖ in float64; infinite for another shape or NaN."""
    actual, expected = (
        np.asarray(array(v) if not isinstance(v, torch.Tensor) else v.detach(), "float64") for v in (actual, expected)
    )
    if actual.shape != expected.shape:
        return float("inf")
    found = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    return float(found) if np.isfinite(found) else float("inf")


def in_pytorch(model, values):
    """Values of ``model.trainable_variables``, in PyTorch's shapes and by PyTorch's names."""
    by_id = {id(v): array(value) for v, value in zip(model.trainable_variables, values, strict=True)}
    return {name: by_id[id(v)].transpose(order) for name, order, v in _named(model) if id(v) in by_id}


def gradients(model, x, cotangent, output="logits"):
    """Gradients of ∑ cotangent · output for the image and, by PyTorch's names, every weight."""
    if ON_TORCH:
        image = torch.from_numpy(x).requires_grad_()
        variables = [v.value for v in model.trainable_variables]
        loss = (model(image)[output] * torch.from_numpy(cotangent)).sum()
        first, *rest = torch.autograd.grad(loss, [image, *variables])
    elif ON_JAX:
        import jax

        fixed = [v.value for v in model.non_trainable_variables]

        def value(image, variables):
            result, _ = model.stateless_call(variables, fixed, image)
            return (result[output] * cotangent).sum()

        variables = [v.value for v in model.trainable_variables]
        first, rest = jax.grad(value, argnums=(0, 1))(jax.numpy.asarray(x), variables)
    else:
        import tensorflow as tf

        image, variables = tf.constant(x), [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(image)
            loss = tf.reduce_sum(model(image)[output] * cotangent)
        first, *rest = tape.gradient(loss, [image, *variables])
    return array(first), in_pytorch(model, rest)
