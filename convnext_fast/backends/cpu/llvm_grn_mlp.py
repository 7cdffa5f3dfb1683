"""`mlp.mlp_fwd` and `mlp_bwd` with a global response norm as kernels of our own for an x86 CPU, as `llvm_mlp` has them
without one: blocks are of whole samples, and each kernel makes two passes over a block.

P pixels, C channels, K hidden units; everything is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import llvm, llvm_mlp
from .llvm import dense
from .llvm_mlp import pack


def grn_mlp_fwd(machine, x, residual, norm, mlp, grn, scale, save_hidden) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `mlp.mlp_fwd`, whose arguments it takes; scale: (P, 1)."""
    kernels, (hidden, channels) = llvm.launchers(), mlp.w1.shape
    y, norms = torch.empty_like(x), x.new_empty(len(x) // grn.pixels, hidden)
    a = x.new_empty(len(x), hidden) if save_hidden else None
    w1, w2 = pack(machine, mlp.w1, None, True), pack(machine, mlp.w2, None, True)
    given = *llvm_mlp.affine(x, norm), w1, dense(mlp.b1), w2, dense(mlp.b2), *_affine(grn)
    sizes, scale = kernels.GrnMlpSizes(channels, hidden, save_hidden, scale is not None), dense(scale)
    blocks = grn.blocks(len(x), 8 * hidden)  # as of frozen blocks
    h = x.new_empty(blocks[0].stop + machine.rows, hidden + kernels.PADDING)
    units = -(-grn.pixels // kernels.unit_of_rows(machine, grn.pixels))
    squares = x.new_empty(grn.samples(blocks[0]).stop * units, hidden)
    for rows in blocks:
        parts, own = (None if t is None else t[rows] for t in (x, residual, y, a, scale)), norms[grn.samples(rows)]
        tensors = *parts, *given, own, h, squares
        kernels.run_rows(machine, sizes, len(own), grn.pixels, norm.eps, *llvm_mlp.addresses(tensors))
    return y, a, norms


def grn_mlp_bwd(machine, dy, x, a, norm, mlp, grn, scale) -> tuple[Tensor | None, ...]:
    """As `mlp.mlp_bwd`, whose arguments it takes; scale: (P, 1). The norms are computed again."""
    kernels, (hidden, channels) = llvm.launchers(), mlp.w1.shape
    given = *llvm_mlp.weights_of_backward(machine, x, a, norm, mlp), *_affine(grn)
    sizes, scale = kernels.GrnMlpBwdSizes(channels, hidden, a is not None, scale is not None), dense(scale)
    units = -(-grn.pixels // kernels.unit_of_rows(machine, grn.pixels))
    d_gamma, d_beta = x.new_empty(len(x) // grn.pixels, hidden), []
    blocks = grn.blocks(len(x), 8 * (channels + hidden + 2 * kernels.PADDING))
    operands = llvm_mlp.Operands(machine, x, channels, hidden, blocks[0].stop)
    for rows in blocks:
        own = d_gamma[grn.samples(rows)]
        count = len(own)
        sums, products = x.new_empty(count * units, hidden + 3 * channels), x.new_empty(count * units, 3, hidden)
        pixels = (None if t is None else t[rows] for t in (dy, x, a, scale, operands.dx))
        tensors = *pixels, *operands.padded, sums, *given, own, products
        kernels.run_rows(machine, sizes, count, grn.pixels, norm.eps, *llvm_mlp.addresses(tensors))
        operands.add(sums, rows)
        d_beta.append(products[:, 2].sum(0))
    dw2, dw1, db1, db2, dg, dbeta = operands.results(norm)
    return operands.dx, dg, dbeta, dw1, db1, dw2, db2, None, d_gamma.sum(0), torch.stack(d_beta).sum(0)


def _affine(grn: Any) -> tuple[Tensor, Tensor]:
    return dense(grn.gamma), grn.gamma.new_zeros(len(grn.gamma)) if grn.beta is None else dense(grn.beta)
