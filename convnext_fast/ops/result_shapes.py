"""What the fused ops return on a CPU, as shapes alone: for compilers, which treat each op there as a whole.

One function for each operator in `operators` that a CPU runs, with its arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _grads(*inputs: Tensor | None) -> list[Tensor]:
    """A gradient for each input; an absent one is empty."""
    return [torch.empty(0) if i is None else i.new_empty(i.shape) for i in inputs]


def block_fwd(x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `operators.block_fwd`."""
    w1, recompute, dtype = args[4], args[-2], args[-1]
    rows, hidden = x.shape[0] * x.shape[1] * x.shape[2], w1.shape[0]
    u = x.new_empty((rows, x.shape[3]), dtype=dtype) if recompute < 2 else x.new_empty(0)
    a = x.new_empty((rows, hidden), dtype=dtype) if recompute == 0 else x.new_empty(0)
    return x.new_empty(x.shape), u, x.new_empty(0), a


def block_bwd(dy: Tensor, x: Tensor, saved: list[Tensor], *args: object) -> list[Tensor]:
    """See `operators.block_bwd`."""
    dwconv_weight, dwconv_bias, *others = args[:9]
    needs_x, needs_dwconv = args[-2:]
    dwconv = (dwconv_weight, dwconv_bias) if needs_dwconv else (None, None)
    return _grads(x if needs_x else None, *dwconv, *others)


def frozen_block_fwd(x: Tensor, *args: object) -> Tensor:
    """See `operators.frozen_block_fwd`."""
    return x.new_empty(x.shape)


def dwconv_layernorm_fwd(x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    """See `operators.dwconv_layernorm_fwd`."""
    dtype = args[-1]
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    n, u = (x.new_empty(x.shape, dtype=dtype) for _ in range(2))
    return n, u, x.new_empty((2, rows, 1), dtype=torch.promote_types(dtype, torch.float32))


def dwconv_layernorm_bwd(dn: Tensor, x: Tensor, u: Tensor, statistics: Tensor, *args: object) -> list[Tensor]:
    """See `operators.dwconv_layernorm_bwd`."""
    return _grads(x, *args[:4])


def pointwise_mlp_fwd(x: Tensor, residual: Tensor | None, w1: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    """See `operators.pointwise_mlp_fwd`."""
    recompute, dtype = args[-2:]
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    y = x.new_empty(x.shape, dtype=dtype) if residual is None else residual.new_empty(residual.shape)
    return y, x.new_empty((rows, w1.shape[0]), dtype=dtype) if recompute == 0 else x.new_empty(0)


def pointwise_mlp_bwd(dy: Tensor, x: Tensor, a: Tensor, *args: object) -> list[Tensor]:
    """See `operators.pointwise_mlp_bwd`."""
    return _grads(x, *args[:5])
