"""Backward of the fused ops for a batch of cotangents at a time: ``is_grads_batched``, vectorised Jacobians.

Nothing announces it when the forward runs, and the fused backward writes into memory of its own, which no batch passes
through. PyTorch's own formulas let it pass: so the plain reference runs again, with gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def is_batched(dy: Tensor) -> bool:
    """Whether dy stands for a batch, of `torch.func.vmap` or of autograd's own."""
    return torch._C._functorch.is_batchedtensor(dy) or torch._C._functorch.is_legacy_batchedtensor(dy)


def reference_bwd(function: Callable[..., Tensor], dy: Tensor, *tensors: Tensor | None) -> Gradients:
    """The gradient of ``function`` with respect to each of the tensors that is there."""

    def of_present(*present: Tensor) -> Tensor:
        given = iter(present)
        return function(*(None if t is None else next(given) for t in tensors))

    present = [t for t in tensors if t is not None]
    if torch._C._functorch.is_batchedtensor(dy):
        y, pullback = torch.func.vjp(of_present, *present)
        found = iter(pullback(dy.to(y.dtype)))
    else:
        again = torch.is_grad_enabled()  # a derivative of the gradient is wanted
        with torch.enable_grad():
            leaves = [t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in present]
            y = of_present(*leaves)
        found = iter(torch.autograd.grad(y, leaves, dy.to(y.dtype), create_graph=again))
    return tuple(None if t is None else next(found) for t in tensors)
