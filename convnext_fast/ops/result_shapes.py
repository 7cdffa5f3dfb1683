"""The shapes of the fused ops' results on a CPU, for compilers, which treat each op as one operator.

One function for each op that has an operator ``<name>_cpu``, with the arguments of `interface.Backend`. An absent
result is empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cpu.aten_layers import sum_dtype
from ..kernels.weights import BlockWeights, ConvNorm, FrozenBlock, MlpWeights, Saved


def _grads(*inputs: Tensor | None) -> list[Tensor]:
    """A gradient for each input; an absent one is empty."""
    return [torch.empty(0) if i is None else i.new_empty(i.shape) for i in inputs]


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] * x.shape[2]


def block_fwd(
    x: Tensor,
    weights: BlockWeights,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
    recompute: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `interface.Backend.block_fwd`."""
    u = x.new_empty((_pixels(x), x.shape[3]), dtype=dtype) if recompute < 2 else x.new_empty(0)
    a = x.new_empty((_pixels(x), weights.w1.shape[0]), dtype=dtype) if recompute == 0 else x.new_empty(0)
    has_norms = weights.grn_weight is not None and recompute < 2
    norms = x.new_empty((x.shape[0], weights.w1.shape[0]), dtype=sum_dtype(dtype)) if has_norms else x.new_empty(0)
    return x.new_empty(x.shape), u, x.new_empty(0), a, norms


def block_bwd(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    weights: BlockWeights,
    drop_scale: Tensor | None,
    eps: float,
    act: str,
    dtype: torch.dtype,
    needs_x: bool,
    needs_dwconv: bool,
) -> list[Tensor]:
    """See `interface.Backend.block_bwd`."""
    if not needs_dwconv:
        weights = weights._replace(dwconv_weight=None, dwconv_bias=None)
    return _grads(x if needs_x else None, *weights)


def frozen_block_fwd(x: Tensor, weights: FrozenBlock, eps: float, act: str, dtype: torch.dtype) -> Tensor:
    """See `interface.Backend.frozen_block_fwd`."""
    return x.new_empty(x.shape)


def dwconv_layernorm_fwd(x: Tensor, weights: ConvNorm, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """See `interface.Backend.dwconv_layernorm_fwd`."""
    n, u = (x.new_empty(x.shape, dtype=dtype) for _ in range(2))
    return n, u, x.new_empty((2, _pixels(x), 1), dtype=sum_dtype(dtype))


def dwconv_layernorm_bwd(
    dn: Tensor, x: Tensor, u: Tensor, statistics: Tensor, weights: ConvNorm, eps: float, dtype: torch.dtype
) -> list[Tensor]:
    """See `interface.Backend.dwconv_layernorm_bwd`."""
    return _grads(x, *weights)


def pointwise_mlp_fwd(
    x: Tensor,
    residual: Tensor | None,
    weights: MlpWeights,
    drop_scale: Tensor | None,
    act: str,
    recompute: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `interface.Backend.pointwise_mlp_fwd`."""
    y = x.new_empty(x.shape, dtype=dtype) if residual is None else residual.new_empty(residual.shape)
    saves = recompute == 0
    return y, x.new_empty((_pixels(x), weights.w1.shape[0]), dtype=dtype) if saves else x.new_empty(0)


def pointwise_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    a: Tensor | None,
    weights: MlpWeights,
    drop_scale: Tensor | None,
    act: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """See `interface.Backend.pointwise_mlp_bwd`."""
    return _grads(x, *weights)
