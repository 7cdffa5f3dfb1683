"""Stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops the residual branch of each sample with probability ``rate`` ("Deep Networks with Stochastic Depth")."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def draw(self, x: Tensor) -> Tensor | None:
        """The factor of each sample of x (N, …): 0, or 1/(1 − rate), as (N,); None if nothing is dropped.

        Draws random numbers as timm does, so that the same seed drops the same samples.
        """
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.rate
        kept = self._kept(x, keep)
        return kept / keep if keep > 0.0 else kept

    def _kept(self, x: Tensor, keep: float) -> Tensor:
        return x.new_empty(x.shape[0]).bernoulli_(keep)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) with each sample's factor applied."""
        factor = self.draw(x)
        return x if factor is None else x * factor.view(-1, 1, 1, 1)

    def extra_repr(self) -> str:
        """The rate, for `repr`."""
        return f"rate={self.rate:.3f}"


class ConvNextDropPath(DropPath):
    """Stochastic depth that draws random numbers as transformers does."""

    def _kept(self, x: Tensor, keep: float) -> Tensor:
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        return torch.floor(torch.rand(shape, dtype=x.dtype, device=x.device) + keep).flatten()
