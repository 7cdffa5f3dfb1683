"""ConvNeXt V2's global response norm between the linear layers of `mlp`, with ATen calls.

With h = act(n·w1ᵀ + b1), its norms G over the pixels of each sample, and γ and β of the global response norm:

    N = G/(mean_k G + ε)      s = 1 + γ·N      y = residual + drop_scale·((h·s + β)·w2ᵀ + b2)

β goes into b2, and s into h or, where a sample has more pixels than w2 has rows, into w2. With z's gradient dz,
d = dz·w2 and R = Σ_p d·h, a sum for each sample:

    dβ = Σ_p d = (Σ_p dz)·w2      dγ = Σ_n N·R      dG = (γ·R − mean_k(γ·R·N))/(mean_k G + ε)      dh = d·s + h·dG/G

Samples are taken in blocks whose hidden activations stay in the cache. P pixels, C channels, K hidden units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.weights import GRN_EPS
from .aten_layers import Mlp, sum_dtype

_CACHE_BYTES = 24 << 20
"""The most bytes of the hidden activations of a block of samples."""


class ResponseNorm(NamedTuple):
    """A global response norm: γ and β (K,), β is None if it is folded away; pixels: per sample."""

    gamma: Tensor
    beta: Tensor | None
    pixels: int

    def blocks(self, rows: int, row_bytes: int, alone: bool = False) -> list[slice]:
        """The rows of blocks of samples; one empty block if there are no rows. ``alone``: a block for each sample.

        row_bytes: bytes of a row's hidden activations.
        """
        size = self.pixels * (1 if alone else max(1, _CACHE_BYTES // (self.pixels * row_bytes)))
        return [slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]

    def samples(self, rows: slice) -> slice:
        """The samples of a block."""
        return slice(rows.start // self.pixels, rows.stop // self.pixels)

    def forward(self, h: Tensor, mlp: Mlp, into_weight: bool) -> tuple[Tensor, Mlp, Tensor]:
        """h (P, K), the linear layers, and G (N, K). s is in h, or for ``into_weight``, with a single sample, in w2."""
        samples = h.view(-1, self.pixels, h.shape[1])
        norms = _norms_of(samples)
        s = 1 + self.gamma * self._relative(norms)[0]
        if into_weight and len(h):
            return h, mlp._replace(w2=(mlp.w2 * s).to(h.dtype)), norms
        return (samples * s[:, None]).to(h.dtype).view(h.shape), mlp, norms

    def backward(self, d: Tensor, h: Tensor, norms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(dh, h·s, dγ) for d, which may be overwritten, and h (P, K); norms: G (N, K), or None to compute them."""
        wide = sum_dtype(h.dtype)
        d, samples = (t.to(wide).view(-1, self.pixels, h.shape[1]) for t in (d, h))
        g = _norms_of(samples) if norms is None else norms
        (relative, below), r = self._relative(g), (d * samples).sum(1)
        d_relative, s = self.gamma * r, (1 + self.gamma * relative)[:, None]
        d_norms = (d_relative - (d_relative * relative).mean(1, keepdim=True)) / below
        slopes = torch.where(g > 0, d_norms / g, 0.0)
        dh = d.mul_(s).addcmul_(samples, slopes[:, None])
        return dh.to(h.dtype).view(h.shape), (samples * s).to(h.dtype).view(h.shape), (relative * r).sum(0)

    def _relative(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """N for the norms G, and its denominator."""
        below = norms.mean(1, keepdim=True) + GRN_EPS
        return norms / below, below


def _norms_of(h: Tensor) -> Tensor:
    """G of hidden units (N, H·W, K), in at least float32; `torch.linalg.vector_norm` takes ten times as long."""
    return h.to(sum_dtype(h.dtype)).square().sum(1).sqrt_()
