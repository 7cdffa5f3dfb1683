"""The per-pixel backward of `grn_fwd` in training, in two passes (`grn_passes`), like that of `mlp` in `mlp_bwd`.

    d = dz·w2     R_k = Σ_p d·h     N = G/m, m = mean G + ε     dγ = Σ_n N·R
    dG = (γ∘R − mean(γ∘R∘N))/m      dh = d∘f + h∘dG/G, where dG/G is 0 if G is      da = dh·GELU'(a)

The first pass writes a, d, and Σ h², Σ d·h and Σ d of each unit of work. The second pass writes da over d, and h∘f + β,
whose product with dz is w2's gradient.
"""

from __future__ import annotations

from llvmlite import ir

from .gelu import gelu, gelu_derivative
from .gemm import store
from .grn_passes import GrnPasses
from .mlp_bwd import MlpBwd, MlpBwdSizes


class GrnMlpBwdSizes(MlpBwdSizes):
    """The kernel, as `MlpBwdSizes`, with h∘f + β for h; gamma, beta: (K,); d_gamma: N·R (samples, K).

    products: (units, 3, K), of h², d·h and d; in a sample's first unit f and dG/G then replace the first two.
    """

    addresses = (*MlpBwdSizes.addresses[:-1], "gamma", "beta", "d_gamma", "products", "scratch")


class GrnMlpBwd(GrnPasses, MlpBwd, sizes=GrnMlpBwdSizes):
    """Emits the kernel of `GrnMlpBwdSizes`, see `work_sharing.numbers_of_rows`."""

    end = staticmethod(store), 1

    def first_chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """d of the units from ``first`` up to ``last``, and Σ h², Σ d·h and Σ d of each."""
        e, hidden = self.e, self.hidden
        _, da, a = self.hidden_rows(start)
        self.gradient_of_hidden(start, count, da)

        def columns(v: ir.Value) -> None:
            k = e.times(v, e.lanes)

            def add(r: ir.Value, squares: ir.Value, products: ir.Value, total: ir.Value) -> list[ir.Value]:
                d, before = (e.load(e.at(rows, e.times(r, ld)), k) for rows, ld in (da, a))
                h = gelu(e, before)
                return [e.fma(h, h, squares), e.fma(d, h, products), e.builder.fadd(total, d)]

            def unit(u: ir.Value) -> None:
                sums = e.loop(*self.rows_of(u, start), 1, add, *[e.spread(0.0)] * 3)
                for i, total in enumerate(sums):
                    e.store(total, e.at(self._products_of(u), i * hidden), k)

            e.loop(first, last, 1, unit)

        self.mine(0, e.index(hidden // e.lanes), columns)
        self.barrier()

    def _products_of(self, unit: ir.Value) -> ir.Value:
        return self.e.at(self.given["products"], self.e.times(unit, 3 * self.hidden))

    def _factors_of(self, sample: ir.Value) -> tuple[ir.Value, ir.Value]:
        """f and dG/G of a sample."""
        factors = self._products_of(self.e.times(sample, self.units()))
        return factors, self.e.at(factors, self.hidden)

    def sample(self, sample: ir.Value) -> None:
        """f and dG/G, and dγ."""
        e, b, hidden, zero = self.e, self.e.builder, self.hidden, self.e.spread(0.0)
        norms, slopes = self._factors_of(sample)
        gamma, d_gamma = self.given["gamma"], e.at(self.given["d_gamma"], e.times(sample, hidden))
        inverse = self.norms(norms, 3 * hidden, norms)

        def products(k: ir.Value, total: ir.Value) -> list[ir.Value]:
            for j, product in enumerate(self.sums(e.at(slopes, k), 3 * hidden, self.units(), b.fadd)):
                here = e.plus(k, j * e.lanes)
                slope = b.fmul(e.load(gamma, here), product)
                relative = b.fmul(e.load(norms, here), inverse)
                e.store(b.fmul(relative, product), d_gamma, here)
                e.store(slope, slopes, here)
                total = e.fma(slope, relative, total)
            return [total]

        (total,) = e.loop(0, hidden, self.vectors * e.lanes, products, zero)
        mean = self.mean(total)

        def factors(k: ir.Value) -> None:
            norm = e.load(norms, k)
            slope = b.fdiv(b.fmul(b.fsub(e.load(slopes, k), mean), inverse), norm)
            e.store(b.select(b.fcmp_ordered("==", norm, zero), zero, slope), slopes, k)
            e.store(e.fma(e.load(gamma, k), b.fmul(norm, inverse), e.spread(1.0)), norms, k)

        e.loop(0, hidden, e.lanes, factors)

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """The second pass for the units from ``first`` up to ``last``."""
        e, b, arrays = self.e, self.e.builder, self.hidden_rows(start)

        def row(r: ir.Value) -> None:
            h_row, da_row, a_row = (e.at(rows, e.times(r, ld)) for rows, ld in arrays)
            factors, slopes = self._factors_of(self.sample_of(e.plus(start, r)))

            def vector(k: ir.Value) -> None:
                a, factor = e.load(a_row, k), e.load(factors, k)
                h = gelu(e, a)
                dh = e.fma(e.load(da_row, k), factor, b.fmul(h, e.load(slopes, k)))
                e.store(b.fmul(dh, gelu_derivative(e, a)), da_row, k)
                e.store(e.fma(h, factor, e.load(self.given["beta"], k)), h_row, k)

            e.loop(0, self.hidden, e.lanes, vector)

        self.mine(0, count, row)
        self.barrier()
        self.gradient_of_input(first, last, start, count)
