"""LayerNorm and the MLP of a ConvNeXt V2 block in training, in two passes (`grn_passes`).

    n = LayerNorm(u)·g + β     a = n·w1ᵀ + b1     h = GELU(a)     y = x + s·((h∘f + β')·w2ᵀ + b2)

β': the bias of the global response norm. The first pass leaves h, and a if it is saved; the second one y.
"""

from __future__ import annotations

from llvmlite import ir

from .grn_passes import GrnForward
from .mlp import Mlp, MlpSizes
from .work_sharing import PADDING


class GrnMlpSizes(MlpSizes):
    """The kernel, as `MlpSizes`; gamma, beta: (K,); norms: G (N, K); h and squares: see `grn_passes`."""

    addresses = (*MlpSizes.addresses[:-1], "gamma", "beta", "norms", "h", "squares", "scratch")

    @property
    def row(self) -> int:
        """Numbers of a row of scratch memory: n."""
        return self.channels + PADDING


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
