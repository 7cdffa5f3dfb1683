"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """Holds ``module``, a copy of ``model`` in evaluation mode whose parameters follow it: w ← d·w + (1 − d)·w_model.

    The decay d grows as (1 + t) / (10 + t) over the updates t up to ``decay``, so that the average of a short run is
    not dominated by its random start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with ``model`` after optimiser step ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mean, new = ([local(p.detach()) for p in m.parameters()] for m in (self.module, model))
        torch._foreach_lerp_(mean, new, 1 - decay)
        for buffer, value in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(value)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is split over processes: averaging needs no communication."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
