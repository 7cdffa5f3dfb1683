"""The pointwise MLP of a block, forward and backward: the launchers that choose the form.

Forward (``fused.py``, ``gemm.py``, ``gemm_tma.py``):

    x̂ = (u − μ)·rstd      a = x̂·w1gᵀ + b1g      h = act(a)      y = residual + s·γ·(h·w2ᵀ + b2)

Backward (``fused_bwd.py``, ``gemm_bwd.py``):

    dz' = s·dy    dh = q·(dz'·w2g), q·w2g = γ_c·w2    da = dh·act′(a)    dx̂ = da·w1g
    D = daᵀ·x̂ (K, C)    db1 = Σ_p da    E = dz'ᵀ·h (C, K)    dz_sum = Σ_p dz'

w1g and b1g carry LayerNorm's affine, w2g the layer scale (``folding.py``); q is 1 except in float16, where γ·w2 could
underflow. ``fold_bwd`` turns D, db1, E and dz_sum into the gradients of w1, b1, w2, b2, γ and LayerNorm's affine; no
other pass over the pixels is made. Narrow blocks in 16 bits keep the hidden activations on the chip and recompute them
in the backward pass; wide blocks and float32 run as GEMMs with the hidden activations in memory.

ConvNeXt V2 puts a global response norm, h ↦ f·h + bias, between the activation and fc2. Its f needs sums over the
pixels of a sample, which an earlier pass makes (``grn.py``, ``grn_bwd.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..folding import Sums
from ..targets import target_of
from .fused import fused_mlp_fwd
from .fused_bwd import fused_mlp_bwd
from .gemm import gemm_mlp_fwd
from .gemm_bwd import gemm_mlp_bwd
from .gemm_tma import serves, tma_mlp_fwd
from .grn import Grn
from .tuning import is_fused, is_fused_backward


def mlp_fwd(
    u: Tensor,
    stats: Tensor | None,
    residual: Tensor | None,
    w1g: Tensor,
    b1g: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
    save_hidden: bool,
    grn: Grn | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y (P, C), a (P, K) before the activation, in u's dtype, or None unless ``save_hidden``).

    u (P, C) in the compute dtype T; stats (NB, P, 2) float32 partial statistics (``statistics.py``) or None for no
    normalisation; residual (P, C) in any float dtype, which y takes, or None (then y is in T and nothing is added);
    w1g (K, C) in T and b1g (2, K) float32 from ``fold_fwd``; w2 (C, K) in T; b2, gamma (C,) of any float dtype or None;
    drop_scale (N,) of any float dtype or None, N dividing P; act one of ``ACTIVATIONS``; grn, the global response
    norm, or None; out, the memory of y, of any float dtype, and of a copy of y in T or None, instead of new memory. All
    contiguous.
    """
    if is_fused(u.shape[1], u.dtype):
        forward = fused_mlp_fwd
    else:
        forward = tma_mlp_fwd if serves(u, stats, w1g, w2, grn) else gemm_mlp_fwd
    return forward(u, stats, residual, w1g, b1g, w2, b2, gamma, drop_scale, eps, act, save_hidden, grn, out)


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
    grn: Grn | None = None,
) -> tuple[Tensor, Sums]:
    """(du (P, C) in u's dtype, the sums for ``fold_bwd``).

    dy (P, C) in y's dtype; a (P, K) in u's dtype as ``mlp_fwd`` saved it, or None to recompute it; w1g,
    b1g and w2g from ``fold_fwd`` with γ; the rest as in ``mlp_fwd``. du is the gradient at LayerNorm's input, the
    convolution's output; without ``stats`` at u.
    """
    P, C = u.shape
    if P == 0:
        K = w1g.shape[0]
        shapes = ((2, 0, K, C), (0, K), (0, C))
        products, db1, dz = (u.new_empty(shape, dtype=torch.float32) for shape in shapes)
        grads = None if grn is None else u.new_empty((0, 2, K), dtype=torch.float32)
        return u.new_empty(u.shape), Sums(products, db1, None, dz, grads)
    backward = fused_mlp_bwd if is_fused_backward(C, u.dtype, target_of(u)) else gemm_mlp_bwd
    return backward(dy, u, stats, a, w1g, b1g, w2g, drop_scale, eps, act, grn)
