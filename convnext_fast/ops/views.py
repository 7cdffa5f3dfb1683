"""Results that may be changed in place, as those of PyTorch's own layers may.

Autograd forbids that for a view made inside a `torch.autograd.Function`, and, once gradients are wanted, for one made
under ``no_grad``. So the result of what users see as one layer is returned as a tensor of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_unsafe_view = torch.ops.aten._unsafe_view.default


def unlinked(y: Tensor) -> Tensor:
    """y, or where autograd knows it as a view, the same memory, shape and strides as a tensor that it does not."""
    return _unsafe_view(y, y.shape) if y._is_view() else y


def as_nchw(y: Tensor) -> Tensor:
    """(N, H, W, C) seen as (N, C, H, W); the same memory."""
    seen = y.permute(0, 3, 1, 2)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return seen
    return _unsafe_view(seen, seen.shape)  # `seen.data` takes a tenth of the time, and loses forward-mode tangents
