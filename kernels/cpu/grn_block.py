"""A frozen ConvNeXt V2 block in one parallel region, in two passes: its global response norm is over all pixels of a
sample.

    h = GELU(w1·n + b1),   n = LayerNorm(dwconv(x)) without its affine, which w1 and b1 hold (`folding`)
    y = x + w2·(h∘f) + b2

The first pass leaves h, and f of each sample follows (`grn_passes`). The second one writes h∘f in the place of h, and
y.
"""

from __future__ import annotations

from llvmlite import ir

from .dwconv import Convolving
from .frozen_block import BlockSizes
from .gemm import store_gelu, store_sum
from .grn_passes import GrnForward
from .layernorm import normalise
from .machine import Machine
from .work_sharing import PADDING


class GrnBlockSizes(BlockSizes):
    """The kernel for a block, as `BlockSizes`; gamma: (K,); h and squares: see `grn_passes`."""

    addresses = (*BlockSizes.addresses[:-1], "gamma", "h", "squares", "scratch")

    @property
    def row(self) -> int:
        """Numbers of a row of scratch memory: n."""
        return self.channels + PADDING


class GrnBlock(GrnForward, Convolving, sizes=GrnBlockSizes):
    """Emits the kernel of `GrnBlockSizes`."""

    def __init__(self, machine: Machine, sizes: GrnBlockSizes):
        super().__init__(machine, sizes)
        self.normalise = normalise(self.module, machine, self.channels)
        self.fc1 = self.product("w1", "b1", self.channels, self.hidden, store_gelu)
        self.fc2 = self.product("w2", "b2", self.hidden, self.channels, store_sum, arrays=2)

    def first_chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """h of the units from ``first`` up to ``last``, and Σ h² of each."""
        n = self.scratch

        def normalise_in_place(u: ir.Value) -> None:
            self.e.builder.call(self.normalise, [u, u, self.epsilon])

        self.mine(first, last, lambda unit: self.convolve(unit, start, n, self.sizes.row, normalise_in_place))
        self.barrier()
        self.multiply(self.fc1, n, count, (self.row_of_h(start), self.ldh))
        self.barrier()
        self.add_squares(first, last)

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """y of the units from ``first`` up to ``last``."""
        e, channels = self.e, self.channels
        x, y = ((e.at(self.given[name], e.times(start, channels)), channels) for name in ("x", "y"))
        self.respond(start, count)
        self.multiply(self.fc2, self.row_of_h(start), count, y, x)
        self.barrier()
