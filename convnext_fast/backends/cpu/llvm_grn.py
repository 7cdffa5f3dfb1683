"""Frozen blocks of ConvNeXt V2 by a kernel of our own for an x86 CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.weights import FrozenBlock
from .llvm import CompiledBlock, Kernel, dense, launchers
from .response_norm import ResponseNorm


class CompiledV2Block(Kernel):
    """A frozen block."""

    def __init__(self, weights: FrozenBlock, machine: Any):
        (self.hidden, channels), side = weights.w1.shape, weights.dwconv_weight.shape[2]
        first, second = CompiledBlock.packed(weights, machine)
        held = *first, *second, dense(weights.grn_weight.to(torch.float32, copy=True))
        super().__init__(machine, held, partial(launchers().GrnBlockSizes.of, channels, self.hidden, side))

    def launch(self, shape: Sequence[int], eps: float) -> V2Launch:
        """As `Kernel.launch`."""
        return V2Launch(self, shape, eps)


class V2Launch:
    """As `kernels.cpu.launching.Launch`, for blocks of samples whose hidden activations stay in the cache."""

    def __init__(self, block: CompiledV2Block, shape: Sequence[int], eps: float):
        samples, height, width, channels = shape
        pixels, self.parts, counts = height * width, [], []
        row_bytes = 8 * block.hidden  # twice those of h: smaller blocks take 0.95 of the time at 8 images
        for rows in ResponseNorm(block.weights[-1], None, pixels).blocks(samples * pixels, row_bytes):
            counts.append((rows.stop - rows.start) // pixels)
            launch = Kernel.launch(block, (counts[-1], height, width, channels), eps)
            self.parts.append((4 * rows.start * channels, launch))
        largest = self.parts[0][1]
        self.scratch_size, self.wants_zeros = largest.scratch_size, largest.wants_zeros
        self.row, self.tail = block.hidden + launchers().PADDING, block.machine.rows
        self.rows, self.squares = counts[0] * pixels + self.tail, largest.units * block.hidden

    def start(self, x: int, y: int, weights: Sequence[int], scratch: Tensor) -> Callable[[], None]:
        """A function that runs the block; ``weights`` are the block's own."""
        return partial(self._run, x, y, weights, scratch)

    def _run(self, x: int, y: int, weights: Sequence[int], scratch: Tensor) -> None:
        new = launchers().memory
        h, squares = new(self.rows * self.row).view(self.rows, self.row), new(self.squares)
        h[-self.tail :].zero_()  # see `Launch.wants_zeros`
        for place, launch in self.parts:
            launch.start(x + place, y + place, (*weights, h.data_ptr(), squares.data_ptr()), scratch)()
