"""The losses of transformers' TensorFlow classifier: one value per sample."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from ..config import PROBLEM_TYPES

LEFT_OUT = -100
"""Label of a sample that has no loss."""


def sample_losses(labels: Any, logits: Any, problem_type: str | None) -> tuple[Any, Any]:
    """Losses, (N,) in float32 and 0 where left out, and whether each sample counts, (N,).

    Args:
        labels: class indices (N,), with −100 for samples to leave out; for "regression" (N,) or (N, num_labels), for
            "multi_label_classification" (N, num_labels).
        logits: (N, num_labels).
        problem_type: one of ``config.PROBLEM_TYPES``, or None to choose: regression for one label, cross-entropy for
            integers, and binary cross-entropy for floats.

    Raises:
        TypeError, ValueError: the labels' dtype, shape or values do not fit the loss. In a compiled graph values cannot
            be read; there the loss of a class index out of range is NaN.
    """
    count = logits.shape[1]
    labels = ops.convert_to_tensor(labels)
    is_float = keras.backend.is_float_dtype(keras.backend.standardize_dtype(labels.dtype))
    kind = problem_type or (PROBLEM_TYPES[0] if count == 1 else PROBLEM_TYPES[2] if is_float else PROBLEM_TYPES[1])
    logits = ops.cast(logits, "float32")
    if kind == "single_label_classification":
        if is_float:
            raise TypeError(f"labels are {labels.dtype}: expected integer class indices for {kind}")
        if len(labels.shape) > 1 and tuple(labels.shape[1:]) != (1,):
            raise ValueError(f"labels have shape {tuple(labels.shape)}: expected (N,) for {kind}")
        labels = ops.reshape(labels, (-1,))
        values = _read(labels)
        outside = [] if values is None else values[(values != LEFT_OUT) & ((values < 0) | (values >= count))]
        if len(outside):
            raise ValueError(f"labels hold {outside[0]}: expected class indices from 0 to {count - 1}, or {LEFT_OUT}")
        counts = labels != LEFT_OUT
        inside = (labels >= 0) & (labels < count)
        safe = ops.where(inside, labels, ops.zeros_like(labels))
        losses = ops.sparse_categorical_crossentropy(safe, logits, from_logits=True)
        losses = ops.where(inside, losses, ops.where(counts, float("nan"), 0.0))
        return losses, counts
    if len(labels.shape) == 1 and count == 1:
        labels = ops.expand_dims(labels, 1)
    if len(labels.shape) != 2 or labels.shape[1] != count:
        raise ValueError(f"labels have shape {tuple(labels.shape)}: expected (N, {count}) for {kind}")
    labels = ops.cast(labels, "float32")
    if kind == "regression":
        losses = ops.mean(ops.square(logits - labels), axis=1)
    else:
        losses = ops.mean(ops.binary_crossentropy(labels, logits, from_logits=True), axis=1)
    return losses, ops.ones_like(losses, dtype="bool")


def mean_of(losses: Any, counts: Any, weights: Any = None) -> Any:
    """The mean of the losses (N,), each times its weight (N,), over the samples that count."""
    if weights is not None:
        losses = losses * ops.reshape(ops.cast(weights, losses.dtype), (-1,))
    return ops.sum(losses) / ops.maximum(ops.sum(ops.cast(counts, losses.dtype)), 1.0)


def _read(labels: Any) -> np.ndarray | None:
    """The values of a tensor on a CPU; None if it has none yet, or reading would wait for a GPU."""
    if keras.backend.is_keras_tensor(labels):
        return None
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        return None if labels.device.type != "cpu" or torch.compiler.is_compiling() else labels.numpy()
    if backend == "jax":
        import jax

        return None if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
    return labels.numpy() if hasattr(labels, "numpy") else None
