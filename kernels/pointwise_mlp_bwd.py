"""Pointwise MLP of the block, backward: the gradient of its input, and sums from which the parameters' follow.

    dz' = s·dy    dh = dz'·w2γ, w2γ = γ_c·w2    da = dh·act′(a)    dx̂ = da·w1g
    D = daᵀ·x̂ (K, C)    db1 = Σ_p da    E = dz'ᵀ·h (C, K)    dz_sum = Σ_p dz'

``fold_bwd`` (``parameters.py``) turns D, db1, E and dz_sum into the gradients of w1, b1, w2, b2, γ and LayerNorm's
affine; no other pass over the pixels is made. Narrow blocks in 16 bits recompute the hidden activations on the chip
(``pointwise_mlp_bwd_fused.py``). Here, for the others, one kernel writes h and da, and library GEMMs with float32 sums
do the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activation_and_grad
from .gelu import gelu_form
from .launching import launch
from .layernorm import layernorm_bwd_kernel, layernorm_fwd
from .matmul import matmul_fp32
from .pointwise_mlp_bwd_fused import fused_bwd
from .pointwise_mlp_gemm import load_tile, tile_of_program
from .targets import target_of
from .tuning_mlp import dot_precision, hidden_grad_config, is_fused_backward, norm_blocks, row_tile


@triton.jit(do_not_specialize=["P", "rows_per_sample"])
def _scale_kernel(
    dy_ptr, drop_scale_ptr, dz_ptr, sum_ptr, P, rows_per_sample, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz' = s·dy rounded to the compute dtype (nothing where ``dz_ptr`` is None), and its sums over BLOCK_M rows."""
    pid = tl.program_id(0).to(tl.int64)
    rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < P
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = rows[:, None] * C + c[None, :]
    ok = rows_ok[:, None] & (c < C)[None, :]
    dz = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if drop_scale_ptr is not None:
        dz *= tl.load(drop_scale_ptr + rows // rows_per_sample, mask=rows_ok, other=0.0)[:, None]
    if dz_ptr is not None:
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=ok)
    tl.store(sum_ptr + pid * C + c, tl.sum(dz, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["P"])
def _hidden_kernel(
    x_ptr, dz_ptr, a_ptr, w1_ptr, b1_ptr, w2_ptr, h_ptr, da_ptr, db1_ptr, P,
    C: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h and da of a tile of pixels by hidden units, and da's sums over the tile's pixels; a is loaded or recomputed."""
    tile_m, tile_n = tile_of_program(P, K, BLOCK_M, BLOCK_N, 8)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    rows_ok = first + rows < P
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < K
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, C, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        dz = load_tile(dz_ptr + first * C, rows, rows_ok, k, False, C, BLOCK_K)
        w2 = load_tile(w2_ptr, k, k < C, n, C % BLOCK_K == 0, K, BLOCK_N)
        dh = tl.dot(dz, w2, dh, input_precision=PRECISION)
        if a_ptr is None:
            x = load_tile(x_ptr + first * C, rows, rows_ok, k, False, C, BLOCK_K)
            w1 = load_tile(w1_ptr, n, n_ok, k, K % BLOCK_N == 0, C, BLOCK_K)
            a = tl.dot(x, w1.T, a, input_precision=PRECISION)
    at = first * K + rows[:, None] * K + n[None, :]
    ok = rows_ok[:, None] & n_ok[None, :]
    if a_ptr is None:
        a += tl.load(b1_ptr + n, mask=n_ok, other=0.0)[None, :]
    else:
        a = tl.load(a_ptr + at, mask=ok, other=0.0).to(tl.float32)
    h, slope = activation_and_grad(a, ACT, FORM)
    da = dh * slope
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=ok)
    tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), mask=ok)
    tl.store(db1_ptr + tile_m.to(tl.int64) * K + n, tl.sum(da, axis=0), mask=n_ok)


def _scaled(dy: Tensor, drop_scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(dz' in ``dtype``, which is dy itself where nothing changes it, and dz_sum (C,) float32)."""
    P, C = dy.shape
    dz = None if drop_scale is None and dy.dtype == dtype else torch.empty((P, C), dtype=dtype, device=dy.device)
    BLOCK_M, BLOCK_C = 64, min(64, triton.next_power_of_2(C))
    sums = torch.empty((triton.cdiv(P, BLOCK_M), C), dtype=torch.float32, device=dy.device)
    launch(
        _scale_kernel, (triton.cdiv(P, BLOCK_M), triton.cdiv(C, BLOCK_C)),
        dy, drop_scale, dz, sums, P, 1 if drop_scale is None else P // drop_scale.numel(),
        C=C, BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
    return dy if dz is None else dz, sums.sum(0)


def gemm_bwd(
    dy: Tensor,
    u: Tensor,
    stats: Tensor | None,
    a: Tensor | None,
    w1g: Tensor,
    b1g: Tensor,
    w2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``mlp_bwd`` with h and da in memory, whatever the width; P > 0."""
    P, C = u.shape
    K = w1g.shape[0]
    w2g = w2 if gamma is None else (w2 * gamma[:, None]).to(u.dtype)
    dz, dz_sum = _scaled(dy, drop_scale, u.dtype)
    x = u if stats is None else layernorm_fwd(u, stats, None, None, eps)
    config = hidden_grad_config(P, K, C, u.dtype, target_of(u))
    tiles = triton.cdiv(P, config.BLOCK_M)
    h, da = torch.empty((2, P, K), dtype=u.dtype, device=u.device)
    db1 = torch.empty((tiles, K), dtype=torch.float32, device=u.device)
    launch(
        _hidden_kernel, (tiles * triton.cdiv(K, config.BLOCK_N),),
        x, dz, a, w1g, b1g, w2g, h, da, db1, P,
        C=C, K=K, ACT=act, FORM=gelu_form(u.dtype), PRECISION=dot_precision(u), **config.meta(),
    )  # fmt: skip
    E = matmul_fp32(dz.t(), h)
    D = matmul_fp32(da.t(), x)
    dx = da @ w1g
    if stats is not None:
        BR, BC = row_tile(C)
        CB, NB = norm_blocks(stats, C, u.dtype)
        launch(
            layernorm_bwd_kernel, (triton.cdiv(P, BR),),
            dx, u, stats, u, dx, P, C, eps, CB=CB, NB=NB, WEIGHT=False, BR=BR, BC=BC, num_warps=4,
        )  # fmt: skip
    return dx, D, db1.sum(0), E, dz_sum


def mlp_bwd(
    dy: Tensor,
    u: Tensor,
    stats: Tensor | None,
    a: Tensor | None,
    w1g: Tensor,
    b1g: Tensor,
    w2: Tensor,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du (P, C) in u's dtype, D (K, C), db1 (K,), E (C, K), dz_sum (C,)), the sums in float32.

    dy (P, C) in the residual's dtype; a (P, K) in u's dtype as ``mlp_fwd`` saved it, or None to compute it anew; the
    rest as in ``mlp_fwd``. du is the gradient at LayerNorm's input, the convolution's output; without ``stats`` at u.
    """
    P, C = u.shape
    if P == 0:
        K = w1g.shape[0]
        zeros = (torch.zeros(shape, dtype=torch.float32, device=u.device) for shape in ((K, C), (K,), (C, K), (C,)))
        return torch.empty_like(u), *zeros
    backward = fused_bwd if is_fused_backward(C, u.dtype) else gemm_bwd
    return backward(dy, u, stats, a, w1g, b1g, w2, gamma, drop_scale, eps, act)
