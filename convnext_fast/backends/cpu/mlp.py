"""LayerNorm and the pointwise MLP on rows of pixels, with ATen calls: the part of ``aten`` that is no convolution.

Rows are worked on in blocks whose hidden activations stay in the cache, the normalised activations are never saved, and
in float32 the products go to oneDNN (see ``onednn``), which applies the activation and the residual inside them.

P pixels, C channels, K hidden units, T the compute dtype, R the dtype of the residual stream.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import ACTIVATION_FUNCTIONS
from . import llvm, llvm_mlp, onednn
from .row_blocks import row_blocks

_aten = torch.ops.aten

# In place.
ACTIVATIONS_ = {
    "gelu": _aten.gelu_,
    "gelu_new": partial(_aten.gelu_, approximate="tanh"),
    "relu": torch.relu_,
    "silu": _aten.silu_,
    "selu": torch.selu_,
}


def _activation(a: Tensor, act: str) -> Tensor:
    """act(a), a new tensor."""
    if act == "gelu" and onednn.serves(a) and llvm.serves_gelu(a):
        return llvm.gelu(a)
    return ACTIVATION_FUNCTIONS[act](a)


def _activation_and_bwd_(dh: Tensor, a: Tensor, act: str, h: Tensor) -> tuple[Tensor, Tensor]:
    """dh·act'(a) in the place of dh, and act(a) in h, which may be a."""
    if act == "gelu" and onednn.serves(a) and llvm.serves_gelu(a):
        llvm.gelu_bwd_(dh, a, h)
        return dh, h
    da = _activation_bwd_(dh, a, act)
    return da, ACTIVATIONS_[act](h if h is a else h.copy_(a))


def _activation_bwd_(dh: Tensor, a: Tensor, act: str) -> Tensor:
    """dh · act'(a), in the place of dh."""
    if act == "gelu":
        return _aten.gelu_backward.grad_input(dh, a, grad_input=dh)
    if act == "gelu_new":
        return _aten.gelu_backward.grad_input(dh, a, approximate="tanh", grad_input=dh)
    if act == "relu":
        return _aten.threshold_backward.grad_input(dh, a, 0, grad_input=dh)
    if act == "silu":
        return _aten.silu_backward.grad_input(dh, a, grad_input=dh)
    return _aten.elu_backward.grad_input(dh, 1.6732632423543772, 1.0507009873554805, 1.0, False, a, grad_input=dh)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.promote_types(dtype, torch.float32)


class Norm(NamedTuple):
    """LayerNorm: affine (C,), None for the identity, and epsilon."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """LayerNorm(u), μ and rstd for u (P, C)."""
        return torch.native_layer_norm(u, [u.shape[1]], *self._affine(u), self.eps)

    def backward(
        self, dn: Tensor, u: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(du, dg, dβ)."""
        needs = [True, self.weight is not None, self.bias is not None]
        return _aten.native_layer_norm_backward(dn, u, [u.shape[1]], mean, rstd, *self._affine(u), needs)

    def _affine(self, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """In a dtype in which PyTorch also keeps the statistics."""
        wide, weight, bias = sum_dtype(u.dtype), self.weight, self.bias
        if wide != u.dtype and weight is None:
            weight = u.new_ones(u.shape[1], dtype=wide)
        return None if weight is None else weight.to(wide), None if bias is None else bias.to(wide)


class Mlp(NamedTuple):
    """The parameters after LayerNorm; w1 (K, C), b1 (K,), w2 (C, K), b2 (C,), γ (C,) or None."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    gamma: Tensor | None
    act: str

    def to(self, dtype: torch.dtype) -> Mlp:
        """The linear layers in ``dtype``."""
        return self._replace(**{name: getattr(self, name).to(dtype) for name in ("w1", "b1", "w2", "b2")})

    def forward(self, n: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
        """residual + scale·γ·(act(n·w1ᵀ + b1)·w2ᵀ + b2) for rows of n in T and of the residual in R; scale: (P, 1)."""
        return self.second(linear(n, self.w1, self.b1, self.act), residual, scale)

    def second(self, h: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
        """The same from h on."""
        gamma = self.gamma
        if residual is not None and gamma is None and scale is None and onednn.serves(h) and onednn.serves(residual):
            return onednn.linear_add(h, self.w2, self.b2, residual)
        z = linear(h, self.w2, self.b2)
        if scale is not None:
            z *= scale
        if residual is None:
            return z if gamma is None else (z * gamma).to(z.dtype)
        if gamma is None:
            return residual + z
        return torch.addcmul(residual, z, gamma, out=z if z.dtype == residual.dtype == gamma.dtype else None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None) -> Tensor:
    """act(x·weightᵀ + bias) in the dtype of x."""
    inside = None
    if onednn.serves(x):
        inside = act if act is not None and onednn.fuses(act) else None
        y = onednn.linear(x, weight, bias, inside)
    else:
        y = F.linear(x, weight, bias)
    return y if act == inside else ACTIVATIONS_[act](y)


def mlp_fwd(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm | None,
    mlp: Mlp,
    drop_scale: Tensor | None,
    save_hidden: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = residual + drop_scale·γ·(act(a)·w2ᵀ + b2), and a = norm(x)·w1ᵀ + b1 if ``save_hidden``.

    x: (P, C) in T; residual and y: (P, C) in R; drop_scale: (N,), for P/N rows each; a: (P, K) in T. ``overwrite``: y
    may take the place of x, which saves the page faults of a large new tensor.
    """
    machine = None if residual is None else llvm_mlp.machine_for((x, residual), mlp, norm)
    scale = _row_scale(drop_scale, x)
    if machine is not None and llvm_mlp.forward_pays(len(x), mlp):
        return llvm_mlp.mlp_fwd(machine, x, residual, norm, mlp, scale, save_hidden, overwrite)
    mlp = mlp.to(x.dtype)
    blocks = row_blocks(x.shape[0], mlp.w1.shape[0] * x.element_size())
    like = x if residual is None else residual
    y = x if overwrite and x.dtype == like.dtype else torch.empty_like(like)
    saved = x.new_empty(x.shape[0], mlp.w1.shape[0]) if save_hidden else None
    for rows in blocks:
        n = x[rows] if norm is None else norm.forward(x[rows])[0]
        rest = None if residual is None else residual[rows], None if scale is None else scale[rows]
        if saved is None:
            z = mlp.forward(n, *rest)
        else:
            a = torch.addmm(mlp.b1, n, mlp.w1.t(), out=saved[rows])
            z = mlp.second(_activation(a, mlp.act), *rest)
        if len(blocks) == 1:
            return z, saved
        y[rows] = z
    return y, saved


def mlp_bwd(
    dy: Tensor, x: Tensor, a: Tensor | None, norm: Norm | None, mlp: Mlp, drop_scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(dx, dg, dβ, dw1, db1, dw2, db2, dγ) for dy (P, C) in R, x (P, C) in T and a (P, K) or None to compute it anew.

    dx: (P, C) in T, the others in at least float32. γ's gradient needs no z: for E = Σ_p dz' ⊗ h and t = Σ_p dz', with
    dz' = drop_scale·dy, it is dγ = Σ_k w2∘E + b2·t; dw2 = γ∘E and db2 = γ·t.
    """
    scale = _row_scale(drop_scale, x)
    machine = llvm_mlp.machine_for((dy, x, a), mlp, norm)
    if machine is not None:
        return llvm_mlp.mlp_bwd(machine, dy, x, a, norm, mlp, scale)
    dtype, wide = x.dtype, sum_dtype(x.dtype)
    original, mlp = mlp, mlp.to(dtype)
    dw1 = db1 = e = t = dg = dbeta = None
    dx = torch.empty_like(x)
    # dh, a, h and da of a block are used together; da takes the place of dh, and h that of an a made here, for a new
    # tensor costs the page faults of its first use.
    blocks = row_blocks(x.shape[0], 4 * mlp.w1.shape[0] * x.element_size())
    d_hidden = x.new_empty(blocks[0].stop, mlp.w1.shape[0])
    hidden = None if a is None else torch.empty_like(d_hidden)
    for rows in blocks:
        n, *statistics = (x[rows],) if norm is None else norm.forward(x[rows])
        dz = dy[rows].to(dtype)
        if scale is not None:
            dz = dz * scale[rows]
        pre = linear(n, mlp.w1, mlp.b1) if a is None else a[rows]
        # PyTorch's BLAS is faster than oneDNN where nothing is fused and the weight is not transposed.
        dh = torch.mm(dz if mlp.gamma is None else (dz * mlp.gamma).to(dtype), mlp.w2, out=d_hidden[: n.shape[0]])
        da, h = _activation_and_bwd_(dh, pre, mlp.act, pre if hidden is None else hidden[: n.shape[0]])
        e, dw1 = _plus_product(e, dz.t(), h), _plus_product(dw1, da.t(), n)
        t, db1 = _plus(t, dz.sum(0, dtype=wide)), _plus(db1, da.sum(0, dtype=wide))
        dn = da @ mlp.w1
        if norm is not None:
            dn, d_weight, d_bias = norm.backward(dn, x[rows], *statistics)
            dg, dbeta = _plus(dg, d_weight), _plus(dbeta, d_bias)
        dx[rows] = dn
    if mlp.gamma is None:
        return dx, dg, dbeta, dw1, db1, e, t, None
    gamma = mlp.gamma.to(wide)
    dgamma = torch.addcmul((original.w2 * e).sum(1), original.b2.to(wide), t)
    return dx, dg, dbeta, dw1, db1, e.mul_(gamma[:, None]), t * gamma, dgamma


def _plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """total + part, in place; the part itself where there is no total yet."""
    return part if total is None or part is None else total.add_(part)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left·right in at least float32.

    Products of bfloat16 sum in float32 and round once, as PyTorch's own weight gradients do; those of float16 stay
    float32, lest the sum, which γ has not made small yet, overflow.
    """
    if left.dtype == torch.float16:
        left, right = left.float(), right.float()
    if total is not None and total.dtype == left.dtype:
        return total.addmm_(left, right)
    return _plus(total, (left @ right).to(sum_dtype(left.dtype)))


def _row_scale(drop_scale: Tensor | None, x: Tensor) -> Tensor | None:
    """The drop-path factor of each row: (P, 1) in T."""
    if drop_scale is None:
        return None
    samples = drop_scale.shape[0]
    return drop_scale.to(x.dtype)[:, None].expand(samples, x.shape[0] // max(samples, 1)).reshape(-1, 1)
