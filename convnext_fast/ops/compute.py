"""A fused op computed by the function of a backend, outside autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from .signatures import SIGNATURES, flatten


def compute(name: str, backend: choose.Name, arguments: Sequence[Any]) -> Any:
    """The results of the op, as `interface.Backend` says, with autocast off, for a backend casts by itself.

    Negative views are resolved, for a backend may read memory as it is.

    Gradients get the dtypes and shapes of what they are gradients of.
    """
    if any(map(_is_negative, flatten(arguments))):
        arguments = SIGNATURES[name].group([t.resolve_neg() if _is_negative(t) else t for t in flatten(arguments)])
    function, kind = getattr(choose.module(backend), name), arguments[0].device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            results = function(*arguments)
    else:
        results = function(*arguments)
    if not name.endswith("_bwd"):
        return results
    named = dict(zip(SIGNATURES[name].names, arguments, strict=True))
    return [_as_input(grad, like) for grad, like in zip(results, (named["x"], *named["weights"]), strict=True)]


def _is_negative(value: Any) -> bool:
    """Whether a tensor is the negative of what is in its memory, as kernels would read it."""
    return isinstance(value, Tensor) and value.is_neg()


def _as_input(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    if grad is None or like is None or (grad.dtype == like.dtype and grad.shape == like.shape):
        return grad if like is not None else None
    return grad.to(like.dtype).reshape(like.shape)
