"""`mlp.mlp_fwd` and `mlp_bwd`, LayerNorm and the pointwise MLP in training, as kernels of our own for an x86 CPU.

Each step packs the weights again, with γ in them. The backward is one kernel for the pixels of a block of rows, which
writes the operands of the weight gradients, and one for each of the two weight gradients.

P pixels, C channels, K hidden units; everything is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import llvm, onednn
from .aten_layers import Mlp, Norm, row_blocks
from .llvm import dense

_MOST_ROWS, _BLOCK_BYTES = 4096, 32 << 20
"""Limits of a block in the backward: its n, dz, h and da stay near the last-level cache."""

_LEAST_ROWS_OF_WIDE = 384
"""The least rows with which the forward of a wide layer is worth packing its weights, which are not in the cache."""


def machine_for(
    rows: tuple[Tensor | None, ...], mlp: Mlp, norm: Norm | None, grn: tuple[Tensor | None, ...] | None = None
) -> Any:
    """The machine of the kernels, with ``grn`` of `llvm_grn_mlp`; None if not supported.

    rows: x, and the residual or dy and a.
    """
    if norm is None or mlp.act != "gelu" or (grn is not None and mlp.gamma is not None):
        return None
    served = all(t is None or (onednn.supports(t) and t.is_contiguous()) for t in rows)
    parameters = (*mlp[:5], norm.weight, norm.bias, *(() if grn is None else grn[:2]))
    served = served and all(t is None or t.dtype == torch.float32 for t in parameters)
    return llvm.machine_for(*mlp.w1.shape) if served else None


def forward_pays(rows: int, mlp: Mlp) -> bool:
    """Whether the forward is worth packing the weights, which ATen's calls do not need."""
    return mlp.w1.numel() < llvm.launchers().WIDE_WEIGHT or rows >= _LEAST_ROWS_OF_WIDE


def mlp_fwd(machine, x, residual, norm, mlp, scale, save_hidden, overwrite) -> tuple[Tensor, Tensor | None]:
    """As `mlp.mlp_fwd`, whose arguments it takes; scale: (P, 1)."""
    hidden, channels = mlp.w1.shape
    y = x if overwrite else torch.empty_like(x)
    a = x.new_empty(len(x), hidden) if save_hidden else None
    b2 = mlp.b2 if mlp.gamma is None else mlp.b2 * mlp.gamma
    w1, w2 = pack(machine, mlp.w1, None, True), pack(machine, mlp.w2, mlp.gamma, True)
    kernels = llvm.launchers()
    sizes = kernels.MlpSizes(channels, hidden, save_hidden, scale is not None)
    given = x, residual, y, a, dense(scale), *affine(x, norm), w1, dense(mlp.b1), w2, dense(b2)
    kernels.run_rows(machine, sizes, 1, len(x), norm.eps, *addresses(given))
    return y, a


class Operands:
    """The gradients of x and of the weights, and the operands of the latter, of a block of at most ``rows``."""

    def __init__(self, machine: Any, x: Tensor, channels: int, hidden: int, rows: int):
        self.machine, self.channels, self.totals = machine, channels, []
        padding, room = llvm.launchers().PADDING, rows + machine.rows  # the last tile reads them
        n, dz = x.new_empty(2, room, channels + padding)
        h, da = x.new_empty(2, room, hidden + padding)
        self.padded = n, dz, h, da
        self.dx, self.dw1, self.dw2 = torch.empty_like(x), x.new_empty(hidden, channels), x.new_empty(channels, hidden)

    def add(self, sums: Tensor, rows: slice) -> None:
        """Add a block, whose kernel has run, to the gradients of the weights."""
        self.totals.append(sums.sum(0))
        (n, dz, h, da), kernels = self.padded, llvm.launchers()
        for left, right, out in ((dz, h, self.dw2), (da, n, self.dw1)):
            sizes, adds = kernels.WeightGradSizes(*out.shape), int(rows.start > 0)
            kernels.run(self.machine, sizes, *addresses((left, right, out)), rows.stop - rows.start, adds)

    def results(self, norm: Norm) -> tuple[Tensor | None, ...]:
        """(dw2, without γ, dw1, db1, Σ dz, dg, dβ)."""
        parts = torch.stack(self.totals).sum(0).split((len(self.dw1), *[self.channels] * 3))
        # Results of an operator share no memory.
        db1, t, dg, dbeta = (part.clone() for part in parts)
        dg, dbeta = (None if p is None else d for p, d in ((norm.weight, dg), (norm.bias, dbeta)))
        return self.dw2, self.dw1, db1, t, dg, dbeta


def weights_of_backward(machine: Any, x: Tensor, a: Tensor | None, norm: Norm, mlp: Mlp) -> tuple[Tensor | None, ...]:
    """The arguments of the backward's kernel from LayerNorm's affine on."""
    w1 = pack(machine, mlp.w1, None, True) if a is None else None
    weights = w1, mlp.b1, pack(machine, mlp.w2, mlp.gamma, False), pack(machine, mlp.w1, None, False)
    return *affine(x, norm), *map(dense, weights), x.new_zeros(max(mlp.w1.shape))


def mlp_bwd(machine, dy, x, a, norm, mlp, scale) -> tuple[Tensor | None, ...]:
    """As `mlp.mlp_bwd`, whose arguments it takes; scale: (P, 1)."""
    kernels, (hidden, channels) = llvm.launchers(), mlp.w1.shape
    given = weights_of_backward(machine, x, a, norm, mlp)
    sizes, scale = kernels.MlpBwdSizes(channels, hidden, a is not None, scale is not None), dense(scale)
    row_bytes = 2 * (channels + hidden + 2 * kernels.PADDING) * x.element_size()
    blocks = row_blocks(len(x), row_bytes, _MOST_ROWS, _BLOCK_BYTES)
    operands = Operands(machine, x, channels, hidden, blocks[0].stop)
    for rows in blocks:
        count = rows.stop - rows.start
        sums = x.new_empty(-(-count // kernels.unit_of_rows(machine, count)), hidden + 3 * channels)
        pixels = (None if t is None else t[rows] for t in (dy, x, a, scale, operands.dx))
        kernels.run_rows(machine, sizes, 1, count, norm.eps, *addresses((*pixels, *operands.padded, sums, *given)))
        operands.add(sums, rows)
    e, dw1, db1, t, dg, dbeta = operands.results(norm)
    if mlp.gamma is None:
        return operands.dx, dg, dbeta, dw1, db1, e, t, None
    dot, w2, gamma = x.new_empty(channels), dense(mlp.w2), dense(mlp.gamma)
    kernels.run(machine, kernels.LayerScaleSizes(channels, hidden), *addresses((e, w2, gamma, dot)))
    return operands.dx, dg, dbeta, dw1, db1, e, t * gamma, dot.addcmul_(mlp.b2, t)


def pack(machine: Any, weight: Tensor, scale: Tensor | None, transposed: bool) -> Tensor:
    """The numbers of `kernels.cpu.packing`, in the shape of weight; scale: a factor for each of its rows."""
    kernels, weight = llvm.launchers(), dense(weight)
    packed, scale = torch.empty_like(weight), dense(scale)
    sizes = kernels.PackSizes(*weight.shape, transposed, scale is not None)
    kernels.run(machine, sizes, *addresses((weight, scale, packed)))
    return packed


def affine(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """LayerNorm's weight and bias, 1 and 0 where there are none."""
    weight = x.new_ones(x.shape[1]) if norm.weight is None else norm.weight
    bias = x.new_zeros(x.shape[1]) if norm.bias is None else norm.bias
    return dense(weight), dense(bias)


def addresses(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """For a launch; 0 for what is absent."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
