"""The classification losses that transformers chooses by ``problem_type``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..config import ConvNextConfig


def classification_loss(logits: Tensor, labels: Tensor, config: ConvNextConfig) -> Tensor:
    """Mean squared error, cross-entropy or binary cross-entropy of logits (N, num_labels); a scalar.

    ``config.problem_type`` chooses the loss. If it is None, the first labels set it: a single output means regression,
    integer labels are classes, and float labels are multi-hot. A compiled model is then compiled once more.

    Args:
        logits: (N, num_labels).
        labels: (N,) class indices for "single_label_classification", with −100 for images to ignore;
            (N, num_labels) of 0.0 or 1.0 for "multi_label_classification"; (N,) or (N, num_labels) floats for
            "regression".
        config: of the model.

    Raises:
        TypeError, ValueError: the labels' dtype, shape or values do not fit the loss.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}: expected a tensor")
    batch, count = logits.shape
    kind, why = config.problem_type, ", the config.problem_type, which the first labels set where it was None"
    if kind is None:
        several = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        kind, why = "regression" if count == 1 else several, ""
    loss = _loss(logits, labels.to(logits.device), kind, batch, count, why)
    if config.problem_type is None:
        config.problem_type = kind
    return loss


def _loss(logits: Tensor, labels: Tensor, kind: str, batch: int, count: int, why: str) -> Tensor:
    if kind == "single_label_classification":
        if labels.is_floating_point():
            raise TypeError(f"labels are {labels.dtype}: expected integer class indices for {kind}{why}")
        if labels.numel() != batch:
            raise ValueError(f"labels have shape {tuple(labels.shape)}: expected ({batch},) for {kind}")
        return F.cross_entropy(logits, labels.view(-1).long())
    if not labels.is_floating_point():
        raise TypeError(f"labels are {labels.dtype}: expected floats for {kind}{why}")
    shapes = [(batch, count)] + ([(batch,)] if count == 1 else [])
    if tuple(labels.shape) not in shapes:
        raise ValueError(f"labels have shape {tuple(labels.shape)}: expected {shapes[0]} for {kind}")
    labels = labels.view(batch, count)
    if kind == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
