"""Pointwise MLP of the block, backward: the gradient of its input, and sums from which the parameters' follow.

    dz' = s·dy    dh = q·(dz'·w2g), q·w2g = γ_c·w2    da = dh·act′(a)    dx̂ = da·w1g
    D = daᵀ·x̂ (K, C)    db1 = Σ_p da    E = dz'ᵀ·h (C, K)    dz_sum = Σ_p dz'

q is 1 but in float16, where γ·w2 could vanish (``parameters.py``). ``fold_bwd`` there turns D, db1, E and dz_sum into
the gradients of w1, b1, w2, b2, γ and LayerNorm's affine; no other pass over the pixels is made. Narrow blocks in 16
bits recompute the hidden activations on the chip (``pointwise_mlp_bwd_fused.py``), the others keep them in memory
(``pointwise_mlp_bwd_gemm.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .parameters import Sums
from .pointwise_mlp_bwd_fused import fused_bwd
from .pointwise_mlp_bwd_gemm import gemm_bwd
from .targets import target_of
from .tuning_mlp import is_fused_backward


def mlp_bwd(
    dy: Tensor,
    u: Tensor,
    stats: Tensor | None,
    a: Tensor | None,
    w1g: Tensor,
    b1g: Tensor,
    w2g: Tensor,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Sums]:
    """(du (P, C) in u's dtype, the sums for ``fold_bwd``).

    dy (P, C) in the residual's dtype; a (P, K) in u's dtype as ``mlp_fwd`` saved it, or None to compute it anew; w1g,
    b1g and w2g from ``fold_fwd`` with γ; the rest as in ``mlp_fwd``. du is the gradient at LayerNorm's input, the
    convolution's output; without ``stats`` at u.
    """
    P, C = u.shape
    if P == 0:
        K = w1g.shape[0]
        shapes = ((2, 0, K, C), (0, K), (0, C))
        products, db1, dz = (torch.empty(shape, dtype=torch.float32, device=u.device) for shape in shapes)
        return torch.empty_like(u), Sums(products, db1, None, dz)
    backward = fused_bwd if is_fused_backward(C, u.dtype, target_of(u)) else gemm_bwd
    return backward(dy, u, stats, a, w1g, b1g, w2g, drop_scale, eps, act)
