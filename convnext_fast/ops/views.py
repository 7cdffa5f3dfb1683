"""Results that may be changed in place, as those of PyTorch's own layers may.

Autograd forbids changing a view that was made inside a `torch.autograd.Function`, or, when gradients are needed, one
made under ``no_grad``. So what users see as the result of one layer is returned as a tensor that is not a view.
"""

from __future__ import annotations

import torch
from torch import Tensor

_unsafe_view = torch.ops.aten._unsafe_view.default


def unlinked(y: Tensor) -> Tensor:
    """y; if y is a view for autograd, a tensor with the same memory, shape and strides that is not one."""
    return _unsafe_view(y, y.shape) if y._is_view() else y


def as_nchw(y: Tensor) -> Tensor:
    """(N, H, W, C) seen as (N, C, H, W); the same memory."""
    seen = y.permute(0, 3, 1, 2)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return seen
    return _unsafe_view(seen, seen.shape)  # `seen.data` takes a tenth of the time, and loses forward-mode tangents
