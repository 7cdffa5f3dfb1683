"""Frozen blocks of ConvNeXt V2 by two kernels of our own for an x86 CPU, the norms of the hidden units between them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.weights import FrozenBlock
from .grn_mlp import ResponseNorm
from .llvm import CompiledBlock, Kernel, dense, launchers


class CompiledV2Block:
    """A frozen block, for contiguous x (N, H, W, C) that `onednn.serves`; machine: what its weights are packed for."""

    def __init__(self, weights: FrozenBlock, machine: Any):
        kernels, (hidden, channels), side = launchers(), weights.w1.shape, weights.dwconv_weight.shape[2]
        first, second = CompiledBlock.packed(weights, machine)
        self._first = Kernel(machine, first, partial(kernels.GrnHiddenSizes.of, channels, hidden, side))
        self._second = Kernel(machine, second, lambda width: kernels.GrnOutputSizes(channels, hidden))
        self._gamma = dense(weights.grn_weight.to(torch.float32, copy=True))

    def __call__(self, x: Tensor, eps: float) -> Tensor:
        """A new tensor (N, H, W, C)."""
        y, hidden = torch.empty_like(x), len(self._gamma)
        grn = ResponseNorm(self._gamma, None, x.shape[1] * x.shape[2])
        for samples, _ in grn.blocks(len(x) * grn.pixels, hidden * x.element_size(), False):
            own = x[samples]
            h, first = x.new_empty(*own.shape[:3], hidden), self._first.launch(own.shape, eps)
            squares = x.new_empty(len(own), first.units // len(own), hidden)
            first(own, h, (squares.data_ptr(), *self._first.addresses))
            factors = grn.factors(squares.sum(1).sqrt_())
            addresses = factors.data_ptr(), own.data_ptr(), *self._second.addresses
            self._second.launch(own.shape, eps)(h, y[samples], addresses)
        return y
