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
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ConvNextV2Model,
    TFConvNextForImageClassification,
    TFConvNextModel,
    TFConvNextV2ForImageClassification,
    TFConvNextV2Model,
)
from convnext_fast.keras.weights import _named

BACKEND = keras.backend.backend()
FIELDS = {"num_stages": 2, "hidden_sizes": (8, 16), "depths": (1, 2), "num_labels": 5, "image_size": 32}
ON_TORCH, ON_JAX, ON_TENSORFLOW = (name == BACKEND for name in ("torch", "jax", "tensorflow"))


CLASSES = {  # by version, and whether it is headless
    (1, False): (ConvNextForImageClassification, TFConvNextForImageClassification),
    (1, True): (ConvNextModel, TFConvNextModel),
    (2, False): (ConvNextV2ForImageClassification, TFConvNextV2ForImageClassification),
    (2, True): (ConvNextV2Model, TFConvNextV2Model),
}


def config_of(version=1, **fields):
    return (ConvNextV2Config if version == 2 else ConvNextConfig)(**{**FIELDS, **fields})


def random_model(version=1, headless=False, **fields):
    """In PyTorch; weight and bias of global response norms from N(0, 1), too."""
    model = randomise(CLASSES[version, headless][0](config_of(version, **fields))).eval()
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            parameter.data *= parameter.numel() ** 0.5
    return model


def twins(folder, headless=False, options=(), version=1, **fields):
    """The same random model in PyTorch and in Keras."""
    model = random_model(version, headless, **fields)
    model.save_pretrained(folder)
    return model, CLASSES[version, headless][1].from_pretrained(folder, **dict(options))


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
