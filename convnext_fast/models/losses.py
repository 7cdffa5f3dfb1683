"""The classification losses that transformers chooses by ``problem_type``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..config import PROBLEM_TYPES


def problem_type_of(labels: Tensor, num_labels: int) -> str:
    """The loss that follows from the labels: one label means regression, integers are classes, floats are multi-hot."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Mean squared error, cross-entropy or binary cross-entropy of logits (N, num_labels); a scalar.

    Args:
        logits: (N, num_labels).
        labels: (N,) class indices for "single_label_classification", with −100 for images to leave out;
            (N, num_labels) of 0.0 or 1.0 for "multi_label_classification"; (N,) or (N, num_labels) floats for
            "regression".
        problem_type: one of ``config.PROBLEM_TYPES``, or None for `problem_type_of`.

    Raises:
        TypeError, ValueError: the labels' dtype, shape or values do not fit the loss.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}: expected a tensor")
    count = logits.shape[1]
    kind = problem_type_of(labels, count) if problem_type is None else problem_type
    if kind not in PROBLEM_TYPES:
        raise ValueError(f"problem_type is {kind!r}: expected one of {', '.join(PROBLEM_TYPES)}")
    labels = labels.to(logits.device)
    batch = logits.shape[0]
    if kind == "single_label_classification":
        if labels.is_floating_point():
            raise TypeError(f"labels are {labels.dtype}: expected integer class indices for {kind}")
        if labels.numel() != batch:
            raise ValueError(f"labels have shape {tuple(labels.shape)}: expected ({batch},) for {kind}")
        return F.cross_entropy(logits, labels.view(-1).long())
    if not labels.is_floating_point():
        raise TypeError(f"labels are {labels.dtype}: expected floats for {kind}")
    shapes = [(batch, count)] + ([(batch,)] if count == 1 else [])
    if tuple(labels.shape) not in shapes:
        raise ValueError(f"labels have shape {tuple(labels.shape)}: expected {shapes[0]} for {kind}")
    labels = labels.view(batch, count)
    if kind == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
