"""A whole frozen block in one parallel region: only x, y and the weights leave the caches of a core.

    y = x + w2·GELU(w1·n + b1) + b2,   n = LayerNorm(dwconv(x)) without its affine, which w1 and b1 hold (`folding`)

A chunk goes from convolution to result while its n and its hidden activations h stay in the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from .dwconv import Convolving
from .gemm import store_gelu, store_sum
from .layernorm import normalise
from .machine import Machine
from .work_sharing import GROUP, PADDING


class BlockSizes(NamedTuple):
    """The kernel for a block; ``group``: pixels that the convolution does at a time, at most W.

    x, y: (N, H, W, C); dwconv_weight: (k·k, C); w1, w2: packed (`gemm.pack`).
    """

    channels: int
    hidden: int
    side: int
    group: int
    addresses = ("x", "y", "dwconv_weight", "dwconv_bias", "w1", "b1", "w2", "b2", "scratch")

    @classmethod
    def of(cls, channels: int, hidden: int, side: int, width: int) -> BlockSizes:
        """For images of this width."""
        return cls(channels, hidden, side, min(width, GROUP))

    @property
    def row(self) -> int:
        """Elements in a row of scratch memory: n and h."""
        return self.channels + self.hidden + 2 * PADDING


class Block(Convolving, sizes=BlockSizes):
    """Emits the kernel of `BlockSizes`."""

    def __init__(self, machine: Machine, sizes: BlockSizes):
        super().__init__(machine, sizes)
        channels, self.hidden, *_ = sizes
        self.normalise = normalise(self.module, machine, channels)
        self.fc1 = self.product("w1", "b1", channels, self.hidden, store_gelu)
        self.fc2 = self.product("w2", "b2", self.hidden, channels, store_sum, arrays=2)

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """y of the units from ``first`` up to ``last``."""
        e, channels = self.e, self.channels
        n, h = self.scratch, e.at(self.scratch, e.times(self.scratch_rows, channels + PADDING))
        x, y = (e.at(self.given[name], e.times(start, channels)) for name in ("x", "y"))
        self.normalised(first, last, start)
        self.multiply(self.fc1, n, count, (h, self.hidden + PADDING), whole=True)
        self.barrier()
        self.multiply(self.fc2, h, count, (y, channels), (x, channels))
        self.barrier()

    def normalised(self, first: ir.Value, last: ir.Value, start: ir.Value) -> None:
        """n of the units from ``first`` up to ``last``, in scratch memory."""
        n, ldn = self.scratch, self.channels + PADDING

        def normalise_in_place(u: ir.Value) -> None:
            self.e.builder.call(self.normalise, [u, u, self.epsilon])

        self.mine(first, last, lambda unit: self.convolve(unit, start, n, ldn, normalise_in_place))
        self.barrier()
