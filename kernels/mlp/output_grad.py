"""The gradient at the MLP's output, with the drop-path factor s, in the compute dtype, and its sums over the pixels.

    dz' = s·dy        dz_sum = Σ_p dz'

The products of the backward read dz' once for every tile of hidden units. Written here once, in 16 bits and scaled, it
costs half the bytes there, and the kernels need neither factor nor conversion. If dy is dz' already, only the sums are
made, which the downsampling needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv
from ..launching import launch
from ..targets import target_of
from .tuning_bwd import output_grad_config


@triton.jit(do_not_specialize=["P", "rows_per_sample", "share"])
def _output_grad_kernel(
    dy_ptr, drop_scale_ptr, dz_ptr, sums_ptr, P, rows_per_sample, share,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (⌈C/BLOCK_N⌉, shares of the pixels); sums: (shares, C) float32."""
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, share, BLOCK_M):
        rows = split * share + start + tl.arange(0, BLOCK_M)
        at = rows[:, None] * C + c[None, :]
        ok = (rows < P)[:, None] & (c < C)[None, :]
        dz = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if drop_scale_ptr is not None:
            s = tl.load(drop_scale_ptr + rows // rows_per_sample, mask=rows < P, other=0.0).to(tl.float32)
            dz *= s[:, None]
        if dz_ptr is not None:
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=ok)
        total += dz
    tl.store(sums_ptr + split * C + c, tl.sum(total, axis=0), mask=c < C)


def output_grad(
    dy: Tensor, drop_scale: Tensor | None, dtype: torch.dtype, summed: bool = False
) -> tuple[Tensor, Tensor]:
    """(dz' (P, C) in ``dtype``, what adds up to dz_sum). The latter is dy itself if dy is dz', unless ``summed``.

    Otherwise it is float32, (shares of the pixels, C). P > 0, unless ``summed``.

    dy (P, C) of any float dtype; drop_scale (N,) of any float dtype or None, N dividing P.
    """
    P, C = dy.shape
    same = drop_scale is None and dy.dtype == dtype
    if same and not summed:
        return dy, dy
    dz = None if same else dy.new_empty((P, C), dtype=dtype)
    block_m, block_n, share = output_grad_config(P, C, target_of(dy))
    sums = dy.new_empty((cdiv(P, share), C), dtype=torch.float32)
    launch(
        _output_grad_kernel, (cdiv(C, block_n), cdiv(P, share)),
        dy, drop_scale, dz, sums, P, P // (1 if drop_scale is None else drop_scale.numel()), share,
        C=C, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return dy if dz is None else dz, sums
