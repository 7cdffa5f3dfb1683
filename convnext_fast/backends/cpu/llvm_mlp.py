"""`mlp.mlp_fwd` and `mlp_bwd`, LayerNorm and the pointwise MLP in training, as kernels of our own for an x86 CPU.

Each training step packs the weights again, with γ in them. The backward runs one kernel on the pixels of a block of
rows, which writes the operands of the weight gradients, and one kernel for each of the two weight gradients. With a
global response norm, a block holds whole samples, and each kernel makes two passes over it.

P pixels, C channels, K hidden units; everything is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import llvm, onednn
from .aten_layers import Mlp, Norm, row_blocks
from .llvm import dense
from .response_norm import ResponseNorm

_MOST_ROWS, _BLOCK_BYTES = 4096, 32 << 20
"""Limits of a block in the backward, so that its n, dz, h and da stay near the last-level cache."""

_LEAST_ROWS_OF_WIDE = 384
"""With fewer rows, the forward of a wide layer does not repay packing its weights, which are not in the cache."""


def machine_for(rows: tuple[Tensor | None, ...], mlp: Mlp, norm: Norm | None, grn: ResponseNorm | None = None) -> Any:
    """The machine that the kernels are compiled for; None if not supported.

    rows: x and the residual, or dy, x and a.
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


def mlp_fwd(
    machine, x, residual, norm, mlp, grn, scale, save_hidden, overwrite
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`mlp.mlp_fwd` with the same arguments, except scale: (P, 1)."""
    kernels, (hidden, channels) = llvm.launchers(), mlp.w1.shape
    y = x if overwrite else torch.empty_like(x)
    a = x.new_empty(len(x), hidden) if save_hidden else None
    b2 = mlp.b2 if mlp.gamma is None else mlp.b2 * mlp.gamma
    w1, w2 = pack(machine, mlp.w1, None, True), pack(machine, mlp.w2, mlp.gamma, True)
    given = *affine(x, norm), w1, dense(mlp.b1), w2, dense(b2)
    pixels, flags = (x, residual, y, a, dense(scale)), (channels, hidden, save_hidden, scale is not None)
    if grn is None:
        sizes = kernels.MlpSizes(*flags)
        kernels.run_rows(machine, sizes, 1, len(x), norm.eps, *addresses((*pixels, *given)))
        return y, a, None
    norms, blocks = x.new_empty(len(x) // grn.pixels, hidden), grn.blocks(len(x), 8 * hidden)  # as in `llvm_grn`
    given += _response(grn)
    h = x.new_empty(blocks[0].stop + machine.rows, hidden + kernels.PADDING)
    squares = x.new_empty(grn.samples(blocks[0]).stop * kernels.units_of_rows(machine, grn.pixels), hidden)
    for rows in blocks:
        own, sizes = norms[grn.samples(rows)], kernels.GrnMlpSizes(*flags)
        tensors = *(None if t is None else t[rows] for t in pixels), *given, own, h, squares
        kernels.run_rows(machine, sizes, len(own), grn.pixels, norm.eps, *addresses(tensors))
    return y, a, norms


def mlp_bwd(machine, dy, x, a, norm, mlp, grn, scale) -> tuple[Tensor | None, ...]:
    """`mlp.mlp_bwd` with the same arguments, except scale: (P, 1). The norms of ``grn`` are recomputed."""
    kernels, (hidden, channels) = llvm.launchers(), mlp.w1.shape
    w1 = pack(machine, mlp.w1, None, True) if a is None else None
    weights = w1, mlp.b1, pack(machine, mlp.w2, mlp.gamma, False), pack(machine, mlp.w1, None, False)
    given = *affine(x, norm), *map(dense, weights), x.new_zeros(max(hidden, channels))
    row_bytes, scale = 8 * (channels + hidden + 2 * kernels.PADDING), dense(scale)
    if grn is None:
        kind, blocks = kernels.MlpBwdSizes, row_blocks(len(x), row_bytes, _MOST_ROWS, _BLOCK_BYTES)
    else:
        kind, blocks, given = kernels.GrnMlpBwdSizes, grn.blocks(len(x), row_bytes), (*given, *_response(grn))
    sizes = kind(channels, hidden, a is not None, scale is not None)
    # The operands of the weight gradients; the last tile reads rows beyond the last pixel.
    room = blocks[0].stop + machine.rows
    n, dz = x.new_empty(2, room, channels + kernels.PADDING)
    h, da = x.new_empty(2, room, hidden + kernels.PADDING)
    dx, dw1, dw2 = torch.empty_like(x), x.new_empty(hidden, channels), x.new_empty(channels, hidden)
    totals, d_response = [], []
    for rows in blocks:
        count = rows.stop - rows.start
        samples, of_sample = (1, count) if grn is None else (count // grn.pixels, grn.pixels)
        units = samples * kernels.units_of_rows(machine, of_sample)
        sums = x.new_empty(units, hidden + 3 * channels)
        pixels = (None if t is None else t[rows] for t in (dy, x, a, scale, dx))
        own = () if grn is None else (x.new_empty(samples, hidden), x.new_empty(units, 3, hidden))
        tensors = *pixels, n, dz, h, da, sums, *given, *own
        kernels.run_rows(machine, sizes, samples, of_sample, norm.eps, *addresses(tensors))
        totals.append(sums.sum(0))
        if grn is not None:
            d_response.append(torch.stack((own[0].sum(0), own[1][:, 2].sum(0))))
        for left, right, out in ((dz, h, dw2), (da, n, dw1)):
            gradient = kernels.WeightGradSizes(*out.shape)
            kernels.run(machine, gradient, *addresses((left, right, out)), count, int(rows.start > 0))
    # Results of an operator share no memory.
    parts = torch.stack(totals).sum(0).split((hidden, *[channels] * 3))
    db1, db2, dg, dbeta = (part.clone() for part in parts)
    results = dx, None if norm.weight is None else dg, None if norm.bias is None else dbeta, dw1, db1, dw2
    if grn is not None:
        return *results, db2, None, *(part.clone() for part in torch.stack(d_response).sum(0))
    if mlp.gamma is None:
        return *results, db2, None, None, None
    dot, w2, gamma = x.new_empty(channels), dense(mlp.w2), dense(mlp.gamma)
    kernels.run(machine, kernels.LayerScaleSizes(channels, hidden), *addresses((dw2, w2, gamma, dot)))
    return *results, db2 * gamma, dot.addcmul_(mlp.b2, db2), None, None


def pack(machine: Any, weight: Tensor, scale: Tensor | None, transposed: bool) -> Tensor:
    """The weight packed as in `kernels.cpu.packing`, in its own shape; scale: a factor for each of its rows."""
    kernels, weight = llvm.launchers(), dense(weight)
    packed, scale = torch.empty_like(weight), dense(scale)
    sizes = kernels.PackSizes(*weight.shape, transposed, scale is not None)
    kernels.run(machine, sizes, *addresses((weight, scale, packed)))
    return packed


def affine(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """LayerNorm's weight and bias; 1 and 0 if absent."""
    weight = x.new_ones(x.shape[1]) if norm.weight is None else norm.weight
    bias = x.new_zeros(x.shape[1]) if norm.bias is None else norm.bias
    return dense(weight), dense(bias)


def _response(grn: ResponseNorm) -> tuple[Tensor, Tensor]:
    """γ and β of the response norm; β is 0 if absent."""
    return dense(grn.gamma), grn.gamma.new_zeros(len(grn.gamma)) if grn.beta is None else dense(grn.beta)


def addresses(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """The addresses of tensors for a launch; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
