"""LayerNorm's affine folded into fc1, and the parameter gradients that fall out of the weight-gradient GEMMs.

Forward, for w1 (K, C), b1 (K,), g and β of LayerNorm (C,):

    w1g = w1∘g, rounded to the compute dtype        b1g = b1 + w1·β        s_k = Σ_c w1g[k, c]

s lets a GEMM normalise in its epilogue: x̂·w1gᵀ = rstd·(u·w1gᵀ − μ·s). It is summed over the rounded weights, so that
the mean cancels exactly.

Backward, from D = Σ_p da_k x̂_c (K, C), db1 = Σ_p da_k, E = Σ_p dz'_c h_k (C, K), dz' the gradient of fc2's output
without γ, and dz_sum = Σ_p dz'_c:

    dw1 = D∘g + db1⊗β      dg_c = Σ_k w1[k, c]·D[k, c]      dβ_c = Σ_k w1[k, c]·db1_k
    dw2 = γ_c·E            db2 = γ_c·dz_sum                  dγ_c = Σ_k w2[c, k]·E[c, k] + b2_c·dz_sum_c
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def _fold_fwd_kernel(
    w1_ptr, b1_ptr, g_ptr, beta_ptr, w1g_ptr, b1g_ptr, K, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    bias = tl.zeros((BLOCK_K,), tl.float32)
    row_sum = tl.zeros((BLOCK_K,), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        ok = (k < K)[:, None] & (c < C)[None, :]
        at = k[:, None].to(tl.int64) * C + c[None, :]
        w = tl.load(w1_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if beta_ptr is not None:
            bias += tl.sum(w * tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :], axis=1)
        if g_ptr is not None:
            w = w * tl.load(g_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        rounded = w.to(w1g_ptr.dtype.element_ty)
        row_sum += tl.sum(rounded.to(tl.float32), axis=1)
        tl.store(w1g_ptr + at, rounded, mask=ok)
    if b1_ptr is not None:
        bias += tl.load(b1_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(b1g_ptr + k, bias, mask=k < K)
    tl.store(b1g_ptr + K + k, row_sum, mask=k < K)


@triton.jit
def _fold_bwd_kernel(
    D_ptr, db1_ptr, E_ptr, dz_sum_ptr, w1_ptr, w2_ptr, b2_ptr, g_ptr, beta_ptr, gamma_ptr,
    dw1_ptr, dg_ptr, dbeta_ptr, dw2_ptr, db2_ptr, dgamma_ptr,
    K, C, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    g = tl.full((BLOCK_C,), 1.0, tl.float32)
    if g_ptr is not None:
        g = tl.load(g_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    beta = tl.zeros((BLOCK_C,), tl.float32)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    gamma = tl.full((BLOCK_C,), 1.0, tl.float32)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    dg = tl.zeros((BLOCK_C,), tl.float32)
    dbeta = tl.zeros((BLOCK_C,), tl.float32)
    dgamma = tl.zeros((BLOCK_C,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_ok = k < K
        at = k[:, None].to(tl.int64) * C + c[None, :]
        ok = k_ok[:, None] & c_ok[None, :]
        D = tl.load(D_ptr + at, mask=ok, other=0.0)
        w1 = tl.load(w1_ptr + at, mask=ok, other=0.0).to(tl.float32)
        db1 = tl.load(db1_ptr + k, mask=k_ok, other=0.0)
        tl.store(dw1_ptr + at, tl.fma(D, g[None, :], db1[:, None] * beta[None, :]), mask=ok)
        dg += tl.sum(w1 * D, axis=0)
        dbeta += tl.sum(w1 * db1[:, None], axis=0)
        at = c[:, None].to(tl.int64) * K + k[None, :]
        ok = c_ok[:, None] & k_ok[None, :]
        E = tl.load(E_ptr + at, mask=ok, other=0.0)
        w2 = tl.load(w2_ptr + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(dw2_ptr + at, E * gamma[:, None], mask=ok)
        dgamma += tl.sum(w2 * E, axis=1)
    dz_sum = tl.load(dz_sum_ptr + c, mask=c_ok, other=0.0)
    if dg_ptr is not None:
        tl.store(dg_ptr + c, dg, mask=c_ok)
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + c, dbeta, mask=c_ok)
    if db2_ptr is not None:
        tl.store(db2_ptr + c, gamma * dz_sum, mask=c_ok)
    if dgamma_ptr is not None:
        if b2_ptr is not None:
            dgamma += tl.load(b2_ptr + c, mask=c_ok, other=0.0).to(tl.float32) * dz_sum
        tl.store(dgamma_ptr + c, dgamma, mask=c_ok)


def fold_fwd(
    w1: Tensor, b1: Tensor | None, ln_weight: Tensor | None, ln_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(w1g (K, C) in ``dtype``, b1g (2, K) float32: the folded bias, then the row sums s of w1g); one launch.

    w1 (K, C), b1 (K,) or None, ln_weight and ln_bias (C,) or None (identity), in any float dtypes, contiguous.
    """
    K, C = w1.shape
    w1g = torch.empty((K, C), dtype=dtype, device=w1.device)
    b1g = torch.empty((2, K), dtype=torch.float32, device=w1.device)
    launch(_fold_fwd_kernel, (triton.cdiv(K, 16),), w1, b1, ln_weight, ln_bias, w1g, b1g, K, C, BLOCK_K=16, BLOCK_C=128)
    return w1g, b1g


def fold_bwd(
    D: Tensor,
    db1: Tensor,
    E: Tensor,
    dz_sum: Tensor,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    gamma: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """(dw1 (K, C), dln_weight (C,), dln_bias (C,), dw2 (C, K), db2 (C,), dgamma (C,)), float32; one launch.

    D (K, C), db1 (K,), E (C, K), dz_sum (C,) float32; w1 (K, C), w2 (C, K) and the vectors in any float dtypes,
    contiguous. The gradient of a parameter that is None is None.
    """
    K, C = w1.shape
    dw1, dw2 = torch.empty_like(D), torch.empty_like(E)
    dg, dbeta, db2, dgamma = (
        None if p is None else torch.empty(C, dtype=torch.float32, device=D.device)
        for p in (ln_weight, ln_bias, b2, gamma)
    )
    launch(
        _fold_bwd_kernel, (triton.cdiv(C, 16),),
        D, db1, E, dz_sum, w1, w2, b2, ln_weight, ln_bias, gamma, dw1, dg, dbeta, dw2, db2, dgamma,
        K, C, BLOCK_C=16, BLOCK_K=64,
    )  # fmt: skip
    return dw1, dg, dbeta, dw2, db2, dgamma
