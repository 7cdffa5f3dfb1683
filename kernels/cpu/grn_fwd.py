"""The two forward kernels of a ConvNeXt V2 block, in two passes (`grn_passes`): a frozen block in one parallel region,
and in training LayerNorm and the MLP.

    frozen:    h = GELU(w1·n + b1)               y = x + w2·(h∘f) + b2           n as of `frozen_block`
    training:  a = n·w1ᵀ + b1,  h = GELU(a)      y = x + s·((h∘f + β)·w2ᵀ + b2)  n as of `mlp`

β: the bias of the global response norm. The first pass writes h, and a if it is saved, and Σ h² of each unit of work to
``squares`` (units, K), where f then replaces the row of a sample's first unit. The second pass writes h∘f + β over h,
and y.
"""

from __future__ import annotations

from llvmlite import ir

from .frozen_block import Block, BlockSizes
from .grn_passes import GrnPasses
from .mlp import Mlp, MlpSizes
from .work_sharing import PADDING


class GrnForward(GrnPasses):
    """A kernel with h∘f + β between two products, where β is an argument, or h∘f."""

    def add_squares(self, first: ir.Value, last: ir.Value) -> None:
        """Σ h² of the units from ``first`` up to ``last``."""
        e = self.e

        def unit(u: ir.Value) -> None:
            start = self.first_pixel(u)
            count = e.minus(self.first_pixel(e.plus(u, 1)), start)
            h, out = self.row_of_h(start), e.at(self.given["squares"], e.times(u, self.hidden))

            def columns(k: ir.Value) -> None:
                for j, total in enumerate(self.sums(e.at(h, k), self.ldh, count, lambda v, total: e.fma(v, v, total))):
                    e.store(total, e.at(out, k), j * e.lanes)

            e.loop(0, self.hidden, self.vectors * e.lanes, columns)

        self.mine(first, last, unit)
        self.barrier()

    def factors_of(self, sample: ir.Value) -> ir.Value:
        """f of a sample."""
        return self.e.at(self.given["squares"], self.e.times(self.e.times(sample, self.units()), self.hidden))

    def sample(self, sample: ir.Value) -> None:
        """f, and G in ``norms`` if that is an argument."""
        e, factors = self.e, self.factors_of(sample)
        norms = e.at(self.given["norms"], e.times(sample, self.hidden)) if "norms" in self.given else factors
        inverse = self.norms(factors, self.hidden, norms)

        def factor(k: ir.Value) -> None:
            relative = e.builder.fmul(e.load(norms, k), inverse)
            e.store(e.fma(e.load(self.given["gamma"], k), relative, e.spread(1.0)), factors, k)

        e.loop(0, self.hidden, e.lanes, factor)

    def respond(self, start: ir.Value, count: ir.Value) -> None:
        """Write h∘f + β over h."""
        e, beta = self.e, self.given.get("beta")

        def row(r: ir.Value) -> None:
            pixel = e.plus(start, r)
            row, factors = self.row_of_h(pixel), self.factors_of(self.sample_of(pixel))

            def vector(k: ir.Value) -> None:
                value = e.load(row, k), e.load(factors, k)
                e.store(e.builder.fmul(*value) if beta is None else e.fma(*value, e.load(beta, k)), row, k)

            e.loop(0, self.hidden, e.lanes, vector)

        self.mine(0, count, row)
        self.barrier()


class GrnBlockSizes(BlockSizes):
    """The frozen kernel, as `BlockSizes`; gamma: (K,)."""

    addresses = (*BlockSizes.addresses[:-1], "gamma", "h", "squares", "scratch")

    @property
    def row(self) -> int:
        """Elements in a row of scratch memory: n."""
        return self.channels + PADDING


class GrnBlock(GrnForward, Block, sizes=GrnBlockSizes):
    """Emits the kernel of `GrnBlockSizes`."""

    def first_chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """h of the units from ``first`` up to ``last``, and Σ h² of each."""
        self.normalised(first, last, start)
        self.multiply(self.fc1, self.scratch, count, (self.row_of_h(start), self.ldh))
        self.barrier()
        self.add_squares(first, last)

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """y of the units from ``first`` up to ``last``."""
        e, channels = self.e, self.channels
        x, y = ((e.at(self.given[name], e.times(start, channels)), channels) for name in ("x", "y"))
        self.respond(start, count)
        self.multiply(self.fc2, self.row_of_h(start), count, y, x)
        self.barrier()


class GrnMlpSizes(MlpSizes):
    """The kernel in training, as `MlpSizes`; gamma, beta: (K,); norms: G (N, K)."""

    addresses = (*MlpSizes.addresses[:-1], "gamma", "beta", "norms", "h", "squares", "scratch")
    row = GrnBlockSizes.row


class GrnMlp(GrnForward, Mlp, sizes=GrnMlpSizes):
    """Emits the kernel of `GrnMlpSizes`, see `work_sharing.numbers_of_rows`."""

    def first_chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """h of the units from ``first`` up to ``last``, and Σ h² of each."""
        self.normalise_rows(start, count)
        self.multiply(self.fc1, self.scratch, count, *self.hidden_places(self.row_of_h(start), start))
        self.barrier()
        self.add_squares(first, last)

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """y of the units from ``first`` up to ``last``."""
        self.respond(start, count)
        self.second_product(self.row_of_h(start), start, count)
