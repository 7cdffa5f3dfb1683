"""LayerNorm and the pointwise MLP of a block in training, a chunk of pixels at a time.

    n = LayerNorm(u)·g + β     a = n·w1ᵀ + b1     h = GELU(a)     y = x + s·(h·w2ᵀ + b2)

w2 and b2 hold γ already (`packing`). s: the factor of drop path for each pixel. n and h of a chunk never leave the
L2 cache; a is written if it is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir

from .gemm import store, store_gelu, store_sum
from .layernorm import normalise
from .llvm_builder import Emitter
from .machine import Machine
from .work_sharing import PADDING, ParallelKernel


class MlpSizes(NamedTuple):
    """The kernel for u, x and y (P, C), a (P, K), scale (P,), w1 and w2 packed.

    ``saves``: a is written; ``scaled``: there are factors of drop path.
    """

    channels: int
    hidden: int
    saves: bool
    scaled: bool
    addresses = ("u", "x", "y", "a", "scale", "ln_weight", "ln_bias", "w1", "b1", "w2", "b2", "scratch")

    @property
    def row(self) -> int:
        """Elements in a row of scratch memory: n and h."""
        return self.channels + self.hidden + 2 * PADDING


def store_both(e: Emitter, z: ir.Value, places: Sequence[ir.Value]) -> None:
    """h = GELU(z) and a = z, for places in h and in a."""
    store_gelu(e, z, places)
    e.store(z, places[1])


class Mlp(ParallelKernel, sizes=MlpSizes):
    """Emits the kernel of `MlpSizes`; its pixels are one sample, see `work_sharing.numbers_of_rows`."""

    def __init__(self, machine: Machine, sizes: MlpSizes):
        super().__init__(machine, sizes)
        channels, hidden, saves, scaled = sizes
        self.normalise = normalise(self.module, machine, channels, affine=True)
        self.fc1 = self.product("w1", "b1", channels, hidden, store_both if saves else store_gelu, 1 + saves)
        self.fc2 = self.product("w2", "b2", hidden, channels, store if scaled else store_sum, 2 - scaled)

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """y of the units from ``first`` up to ``last``."""
        h = self.e.at(self.scratch, self.e.times(self.scratch_rows, self.sizes.channels + PADDING))
        self.normalise_rows(start, count)
        self.multiply(self.fc1, self.scratch, count, *self.hidden_places(h, start))
        self.barrier()
        self.second_product(h, start, count)

    def normalise_rows(self, start: ir.Value, count: ir.Value) -> None:
        """n of ``count`` pixels from ``start`` on, in scratch memory."""
        e, given, channels = self.e, self.given, self.sizes.channels
        u = e.at(given["u"], e.times(start, channels))

        def normalise_row(r: ir.Value) -> None:
            places = e.at(u, e.times(r, channels)), e.at(self.scratch, e.times(r, channels + PADDING))
            e.builder.call(self.normalise, [*places, self.epsilon, given["ln_weight"], given["ln_bias"]])

        self.mine(0, count, normalise_row)
        self.barrier()

    def hidden_places(self, h: ir.Value, start: ir.Value) -> list[tuple[ir.Value, int]]:
        """What ``fc1`` writes: h, and a if it is saved."""
        hidden = self.sizes.hidden
        a = self.e.at(self.given["a"], self.e.times(start, hidden)), hidden
        return [(h, hidden + PADDING), *[a] * self.sizes.saves]

    def second_product(self, h: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """y from h."""
        e, given, (channels, _, _, scaled) = self.e, self.given, self.sizes
        x, y = (e.at(given[name], e.times(start, channels)) for name in ("x", "y"))

        def scale_row(r: ir.Value) -> None:
            factor = e.spread(e.scalar(given["scale"], e.plus(start, r)))

            def vector(c: ir.Value) -> None:
                place = e.plus(e.times(r, channels), c)
                e.store(e.fma(e.load(y, place), factor, e.load(x, place)), y, place)

            e.loop(0, channels, e.lanes, vector)

        self.multiply(self.fc2, h, count, *([(y, channels)] if scaled else [(y, channels), (x, channels)]))
        self.barrier()
        if scaled:
            self.mine(0, count, scale_row)
            self.barrier()
