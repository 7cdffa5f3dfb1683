"""LayerNorm over the channels from statistics that another kernel computed: forward and backward, rows (P, C).

    x̂ = (u − μ)·rstd        n = x̂·g + β
    dx̂ = dn·g               du = rstd·(dx̂ − mean(dx̂) − x̂·mean(dx̂·x̂))        dg = Σ_p dn·x̂        dβ = Σ_p dn

A program takes BR rows and loops over the channels in chunks of BC, twice in the backward (once for the means). dg and
dβ are partial sums, one per program (splits, 2, C), that a second launch adds in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .integers import cdiv, next_power_of_2
from .launching import launch
from .statistics import merge_statistics, stats_block


@triton.jit
def layernorm_fwd_kernel(
    u_ptr, stats_ptr, g_ptr, b_ptr, n_ptr, P, eps,
    C: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """u, n: (P, C); stats: (NB, P, 2); g, b: (C,). Grid (⌈P/BR⌉,)."""
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows_ok = rows < P
    mean, rstd = merge_statistics(stats_ptr, rows, rows_ok, P, C, eps, CB, NB)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        ok = rows_ok[:, None] & (c < C)[None, :]
        at = rows[:, None] * C + c[None, :]
        n = (tl.load(u_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        if WEIGHT:
            n *= tl.load(g_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            n += tl.load(b_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        tl.store(n_ptr + at, n.to(n_ptr.dtype.element_ty), mask=ok)


@triton.jit
def layernorm_bwd_kernel(
    dn_ptr, u_ptr, stats_ptr, g_ptr, du_ptr, P, eps,
    C: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, WEIGHT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dn, u, du: (P, C); stats: (NB, P, 2); g: (C,). Grid (⌈P/BR⌉,)."""
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows_ok = rows < P
    mean, rstd = merge_statistics(stats_ptr, rows, rows_ok, P, C, eps, CB, NB)
    total = tl.zeros((BR,), tl.float32)
    along = tl.zeros((BR,), tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        ok = rows_ok[:, None] & (c < C)[None, :]
        at = rows[:, None] * C + c[None, :]
        xhat = (tl.load(u_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        dxhat = tl.load(dn_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if WEIGHT:
            dxhat *= tl.load(g_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        total += tl.sum(dxhat, 1)
        along += tl.sum(dxhat * xhat, 1)
    total = (total / C)[:, None]
    along = (along / C)[:, None]
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        ok = rows_ok[:, None] & (c < C)[None, :]
        at = rows[:, None] * C + c[None, :]
        xhat = (tl.load(u_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        dxhat = tl.load(dn_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if WEIGHT:
            dxhat *= tl.load(g_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        du = (dxhat - total - xhat * along) * rstd[:, None]
        tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=ok)


@triton.jit
def layernorm_wgrad_kernel(
    dn_ptr, u_ptr, stats_ptr, partial_ptr, P, eps, SPLIT,
    C: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dn, u: (P, C); partial: (splits, 2, C) float32, dg then dβ. Grid (splits, ⌈C/BC⌉); a split is SPLIT rows."""
    split = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    dg = tl.zeros((BR, BC), tl.float32)
    db = tl.zeros((BR, BC), tl.float32)
    for first in range(0, SPLIT, BR):
        rows = split * SPLIT + first + tl.arange(0, BR)
        rows_ok = rows < P
        mean, rstd = merge_statistics(stats_ptr, rows, rows_ok, P, C, eps, CB, NB)
        ok = rows_ok[:, None] & (c < C)[None, :]
        at = rows[:, None] * C + c[None, :]
        dn = tl.load(dn_ptr + at, mask=ok, other=0.0).to(tl.float32)
        dg += dn * ((tl.load(u_ptr + at, mask=ok, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None])
        db += dn
    tl.store(partial_ptr + split * 2 * C + c, tl.sum(dg, 0), mask=c < C)
    tl.store(partial_ptr + split * 2 * C + C + c, tl.sum(db, 0), mask=c < C)


@triton.jit
def layernorm_wgrad_sum_kernel(partial_ptr, dg_ptr, db_ptr, C, SPLITS, BS: tl.constexpr, BC: tl.constexpr):
    """partial: (SPLITS, 2, C); dg, db: (C,). Grid (⌈C/BC⌉,)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    dg = tl.zeros((BS, BC), tl.float32)
    db = tl.zeros((BS, BC), tl.float32)
    for first in range(0, SPLITS, BS):
        split = first + tl.arange(0, BS)
        ok = (split < SPLITS)[:, None] & (c < C)[None, :]
        at = split.to(tl.int64)[:, None] * 2 * C + c[None, :]
        dg += tl.load(partial_ptr + at, mask=ok, other=0.0)
        db += tl.load(partial_ptr + at + C, mask=ok, other=0.0)
    tl.store(dg_ptr + c, tl.sum(dg, 0).to(dg_ptr.dtype.element_ty), mask=c < C)
    tl.store(db_ptr + c, tl.sum(db, 0).to(db_ptr.dtype.element_ty), mask=c < C)


def _tile(channels: int) -> tuple[int, int]:
    """(rows, channels) of a tile: 2,048 elements, at most 256 channels wide."""
    width = min(256, next_power_of_2(channels))
    return max(1, 2048 // width), width


def _blocks(stats: torch.Tensor, channels: int, dtype: torch.dtype) -> int:
    """Channels of a block of ``stats``: all of them when there is one block."""
    return channels if stats.shape[0] == 1 else stats_block(channels, dtype)


def layernorm_fwd(
    u: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """n = LayerNorm(u)·weight + bias over the last axis, in u's dtype.

    ``u`` (…, C), contiguous; ``stats`` (NB, P, 2) float32 of its P rows, as dwconv_fwd gives them or with NB = 1;
    ``weight`` and ``bias`` (C,) of any float dtype, None for 1 and 0.
    """
    channels = u.shape[-1]
    n = u.new_empty(u.shape)
    if u.numel() == 0:
        return n
    pixels = u.numel() // channels
    rows, width = _tile(channels)
    launch(
        layernorm_fwd_kernel, (cdiv(pixels, rows),),
        u, stats, u if weight is None else weight, u if bias is None else bias, n, pixels, eps,
        C=channels, CB=_blocks(stats, channels, u.dtype), NB=stats.shape[0], WEIGHT=weight is not None,
        BIAS=bias is not None, BR=rows, BC=width, num_warps=4,
    )  # fmt: skip
    return n


def layernorm_bwd(
    dn: torch.Tensor, u: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(du in u's dtype, dweight (C,), dbias (C,)) of ``layernorm_fwd`` from ``dn``, shaped like u.

    The gradients of the parameters are in the dtype of ``weight``, float32 where it is None.
    """
    channels = u.shape[-1]
    du = u.new_empty(u.shape)
    dtype = torch.float32 if weight is None else weight.dtype
    if u.numel() == 0:
        zero = torch.zeros(channels, dtype=dtype, device=u.device)
        return du, zero, zero.clone()
    pixels = u.numel() // channels
    rows, width = _tile(channels)
    block = _blocks(stats, channels, u.dtype)
    launch(
        layernorm_bwd_kernel, (cdiv(pixels, rows),),
        dn, u, stats, u if weight is None else weight, du, pixels, eps,
        C=channels, CB=block, NB=stats.shape[0], WEIGHT=weight is not None, BR=rows, BC=width, num_warps=4,
    )  # fmt: skip
    split = max(cdiv(cdiv(pixels, 256), rows) * rows, rows)
    splits = cdiv(pixels, split)
    partial = u.new_empty((splits, 2, channels), dtype=torch.float32)
    launch(
        layernorm_wgrad_kernel, (splits, cdiv(channels, width)),
        dn, u, stats, partial, pixels, eps, split,
        C=channels, CB=block, NB=stats.shape[0], BR=rows, BC=width, num_warps=4,
    )  # fmt: skip
    dweight = u.new_empty(channels, dtype=dtype)
    dbias = u.new_empty(channels, dtype=dtype)
    launch(
        layernorm_wgrad_sum_kernel, (cdiv(channels, 64),),
        partial, dweight, dbias, channels, splits, BS=8, BC=64, num_warps=1,
    )  # fmt: skip
    return du, dweight, dbias
