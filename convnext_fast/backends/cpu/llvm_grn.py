"""Frozen blocks of ConvNeXt V2 by two kernels of our own for an x86 CPU, the norms of the hidden units between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.weights import FrozenBlock
from .grn_mlp import ResponseNorm
from .llvm import CompiledBlock, Kernel, dense, launchers


class CompiledV2Block(Kernel):
    """A frozen block."""

    def __init__(self, weights: FrozenBlock, machine: Any):
        kernels, (hidden, channels), side = launchers(), weights.w1.shape, weights.dwconv_weight.shape[2]
        first, second = CompiledBlock.packed(weights, machine)
        self.first = Kernel(machine, first, partial(kernels.GrnHiddenSizes.of, channels, hidden, side))
        self.second = Kernel(machine, second, lambda width: kernels.GrnOutputSizes(channels, hidden))
        self.gamma = dense(weights.grn_weight.to(torch.float32, copy=True))
        super().__init__(machine, (), self.first.sizes)

    def launch(self, shape: Sequence[int], eps: float) -> V2Launch:
        """As `Kernel.launch`."""
        return V2Launch(self, shape, eps)


class V2Launch:
    """As `kernels.cpu.launching.Launch`, for blocks of samples whose hidden activations stay in the cache."""

    def __init__(self, block: CompiledV2Block, shape: Sequence[int], eps: float):
        samples, height, width, channels = shape
        self.block, self.channels, hidden = block, channels, len(block.gamma)
        self.grn = ResponseNorm(block.gamma, None, height * width)
        self.parts = []
        for part, _ in self.grn.blocks(samples * height * width, 4 * hidden, False):
            count = min(part.stop, samples) - part.start
            own = count, height, width, channels
            self.parts.append((part.start, count, block.first.launch(own, eps), block.second.launch(own, eps)))
        launches = [launch for *_, first, second in self.parts for launch in (first, second)]
        self.scratch_size = max(launch.scratch_size for launch in launches)
        self.wants_zeros = any(launch.wants_zeros for launch in launches)

    def start(self, x: int, y: int, weights: Sequence[int], scratch: Tensor) -> Callable[[], None]:
        """A function that runs the block; ``weights`` are the block's own."""
        return partial(self._run, x, y, scratch)

    def _run(self, x: int, y: int, scratch: Tensor) -> None:
        block, pixels, hidden, new = self.block, self.grn.pixels, len(self.block.gamma), launchers().memory
        h = new(max(count for _, count, *_ in self.parts) * pixels * hidden)
        for begin, count, first, second in self.parts:
            place = 4 * begin * pixels * self.channels
            squares = new(first.units * hidden).view(count, -1, hidden)
            first.start(x + place, h.data_ptr(), (squares.data_ptr(), *block.first.addresses), scratch)()
            factors = self.grn.factors(squares.sum(1).sqrt_())
            given = factors.data_ptr(), x + place, *block.second.addresses
            second.start(h.data_ptr(), y + place, given, scratch)()

    def __call__(self, x: Tensor, y: Tensor, weights: Sequence[int]) -> Tensor:
        """y, filled, for x; both contiguous."""
        launchers().run_sequence([(self, weights)], [x.data_ptr(), y.data_ptr()])
        return y
