"""The per-pixel backward of `mlp`, a chunk at a time; `weight_grad` makes the gradients of the weights.

    dz = s·dy     dh = dz·(γ∘w2)     da = dh·GELU'(a)     h = GELU(a)     dn = da·w1
    du = rstd·(dn∘g − mean(dn∘g) − x̂·mean(dn∘g∘x̂))

n, dz, h and da are written to memory for `weight_grad`, with ``PADDING`` elements after each row. The sums of da, dz,
dn∘x̂ and dn are over the rows of each unit of work, so their order does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir

from .gelu import gelu, gelu_derivative
from .gemm import Epilogue
from .layernorm import normalise, statistics
from .llvm_builder import F32, POINTER, Emitter, define
from .machine import Machine
from .work_sharing import PADDING, ParallelKernel

_SUMMED = 8
"""Rows in one chain of additions."""


class MlpBwdSizes(NamedTuple):
    """The kernel; ``saved``: a is given, not recomputed; ``scaled``: there are factors of drop path.

    dy, u, du: (P, C); a: (P, K); n, dz: (P, C), h, da: (P, K), padded; sums: (units, K + 3·C); w1: packed for a; w2,
    w1_back: for dh and dn; zeros: max(C, K).
    """

    channels: int
    hidden: int
    saved: bool
    scaled: bool
    addresses = (
        *("dy", "u", "a", "scale", "du", "n", "dz", "h", "da", "sums"),
        *("ln_weight", "ln_bias", "w1", "b1", "w2", "w1_back", "zeros", "scratch"),
    )

    @property
    def row(self) -> int:
        """Elements in a row of scratch memory: dn, and dn∘x̂."""
        return 2 * (self.channels + PADDING)


def through_gelu(e: Emitter, dh: ir.Value, places: Sequence[ir.Value]) -> None:
    """da = dh·GELU'(a) and h = GELU(a), for places in da, h and a; a may be h."""
    a = e.load(places[2])
    e.store(e.builder.fmul(dh, gelu_derivative(e, a)), places[0])
    e.store(gelu(e, a), places[1])


class MlpBwd(ParallelKernel, sizes=MlpBwdSizes):
    """Emits the kernel of `MlpBwdSizes`; its pixels are one sample, see `work_sharing.numbers_of_rows`."""

    end: tuple[Epilogue, int] = staticmethod(through_gelu), 3

    def __init__(self, machine: Machine, sizes: MlpBwdSizes):
        super().__init__(machine, sizes)
        channels, hidden, saved, _ = sizes
        self.ldn, self.ldh = channels + PADDING, hidden + PADDING
        self.normalise = normalise(self.module, machine, channels, affine=True)
        self.normalise_bwd = normalise_bwd(self.module, machine, channels)
        self.fc1 = None if saved else self.product("w1", "b1", channels, hidden)
        self.fc2_back = self.product("w2", "zeros", channels, hidden, *self.end)
        self.fc1_back = self.product("w1_back", "zeros", hidden, channels)

    def chunk(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """Everything for the units from ``first`` up to ``last``."""
        h, da, a = self.hidden_rows(start)
        self.gradient_of_hidden(start, count, da, h, a)
        self.gradient_of_input(first, last, start, count)

    def padded(self, name: str, start: ir.Value, ld: int) -> ir.Value:
        """The row of pixel ``start`` in a padded argument."""
        return self.e.at(self.given[name], self.e.times(start, ld))

    def hidden_rows(self, start: ir.Value) -> list[tuple[ir.Value, int]]:
        """h, da and a from pixel ``start`` on, each with its row stride; a is in h unless it is saved."""
        h, da = ((self.padded(name, start, self.ldh), self.ldh) for name in ("h", "da"))
        hidden = self.sizes.hidden
        return [h, da, (self.padded("a", start, hidden), hidden) if self.sizes.saved else h]

    def gradient_of_hidden(self, start: ir.Value, count: ir.Value, *arrays: tuple[ir.Value, int]) -> None:
        """n, dz and, unless it is saved, a; then the product that gives dh, whose epilogue accesses ``arrays``."""
        e, given, (channels, _, _, scaled) = self.e, self.given, self.sizes
        dy, u = (e.at(given[name], e.times(start, channels)) for name in ("dy", "u"))
        n, dz = (self.padded(name, start, self.ldn) for name in ("n", "dz"))

        def row(r: ir.Value) -> None:
            row, padded = e.times(r, channels), e.times(r, self.ldn)
            places = e.at(u, row), e.at(n, padded)
            e.builder.call(self.normalise, [*places, self.epsilon, given["ln_weight"], given["ln_bias"]])
            factor = e.spread(e.scalar(given["scale"], e.plus(start, r))) if scaled else None

            def vector(c: ir.Value) -> None:
                value = e.load(dy, e.plus(row, c))
                e.store(value if factor is None else e.builder.fmul(value, factor), dz, e.plus(padded, c))

            e.loop(0, channels, e.lanes, vector)

        self.mine(0, count, row)
        self.barrier()
        if self.fc1 is not None:
            self.multiply(self.fc1, n, count, self.hidden_rows(start)[0])
        self.multiply(self.fc2_back, dz, count, *arrays)
        self.barrier()

    def gradient_of_input(self, first: ir.Value, last: ir.Value, start: ir.Value, count: ir.Value) -> None:
        """du from da, and the sums of the units from ``first`` up to ``last``."""
        e, given, (channels, hidden, *_), ldn = self.e, self.given, self.sizes, self.ldn
        u, du = (e.at(given[name], e.times(start, channels)) for name in ("u", "du"))
        dz, da = self.padded("dz", start, ldn), self.padded("da", start, self.ldh)
        dn = self.scratch
        dn_x = e.at(dn, e.times(self.scratch_rows, ldn))
        self.multiply(self.fc1_back, da, count, (dn, ldn))
        self.barrier()

        def row(r: ir.Value) -> None:
            row, padded = e.times(r, channels), e.times(r, ldn)
            places = e.at(u, row), e.at(dn, padded), e.at(dn_x, padded), e.at(du, row)
            e.builder.call(self.normalise_bwd, [*places, self.epsilon, given["ln_weight"]])

        self.mine(0, count, row)
        self.barrier()

        def sums_of(unit: ir.Value) -> None:
            rows, sums = self.rows_of(unit, start), e.at(given["sums"], e.times(unit, hidden + 3 * channels))
            self._sum(da, self.ldh, hidden, rows, sums)
            for i, array in enumerate((dz, dn_x, dn)):
                self._sum(array, ldn, channels, rows, e.at(sums, hidden + i * channels))

        e.loop(first, last, 1, sums_of)
        self.barrier()

    def _sum(self, array: ir.Value, ld: int, columns: int, rows: tuple[ir.Value, ir.Value], out: ir.Value) -> None:
        """This thread's columns of the sums over the rows of a range."""
        e = self.e

        def vector(v: ir.Value) -> None:
            c = e.times(v, e.lanes)

            def add(r: ir.Value, part: ir.Value) -> list[ir.Value]:
                return [e.builder.fadd(part, e.load(e.at(array, e.times(r, ld)), c))]

            def add_few(r: ir.Value, total: ir.Value) -> list[ir.Value]:
                end = e.smaller(e.plus(r, _SUMMED), rows[1])
                return [e.builder.fadd(total, *e.loop(r, end, 1, add, e.spread(0.0)))]

            e.store(*e.loop(*rows, _SUMMED, add_few, e.spread(0.0)), out, c)

        self.mine(0, e.index(columns // e.lanes), vector)


def normalise_bwd(module: ir.Module, machine: Machine, channels: int) -> ir.Function:
    """``f(x, dn, dn_x, dx, epsilon, weight)`` for one row: dx of LayerNorm, and dn∘x̂ in dn_x."""
    function = define(module, "normalise_bwd", POINTER, POINTER, POINTER, POINTER, F32, POINTER)
    x, dn, dn_x, dx, epsilon, weight = function.args
    e = Emitter(function, machine.lanes)
    b, step, zero = e.builder, machine.lanes, e.spread(0.0)
    mean, rstd = statistics(e, x, channels, epsilon)
    share = ir.Constant(F32, -1.0 / channels)

    def products(c: ir.Value, first: ir.Value, second: ir.Value) -> list[ir.Value]:
        value, normed = e.load(dn, c), b.fmul(b.fsub(e.load(x, c), mean), rstd)
        product, weighed = b.fmul(value, normed), b.fmul(value, e.load(weight, c))
        e.store(product, dn_x, c)
        return [b.fadd(first, weighed), e.fma(weighed, normed, second)]

    sums = e.loop(0, channels, step, products, zero, zero)
    first, second = (e.spread(b.fmul(e.sum_of_lanes(total), share)) for total in sums)

    def result(c: ir.Value) -> None:
        normed = b.fmul(b.fsub(e.load(x, c), mean), rstd)
        weighed = b.fmul(e.load(dn, c), e.load(weight, c))
        e.store(b.fmul(rstd, e.fma(normed, second, b.fadd(weighed, first))), dx, c)

    e.loop(0, channels, step, result)
    b.ret_void()
    return function
