"""How a call of a fused op runs: for its value alone, under autograd, or as a registered operator in a graph.

Where it runs is the question of `backends.choose`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), torch.dtype, bool, int, float, str, list))


def is_plain(*arguments: object) -> bool:
    """Whether a call on these arguments is seen by nobody: no compiler, no mode that dispatches, no kind of tensor.

    A list counts as what it holds elsewhere in the call.
    """
    return (
        _PLAIN.issuperset(map(type, arguments))
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for x; it leaves float64 alone, and the meta device has none."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64


def wants_values(x: Tensor) -> bool:
    """Whether a call on x is asked for its value alone, and nothing looks on."""
    return not torch.is_grad_enabled() and is_unseen(x)


def is_unseen(x: Tensor) -> bool:
    """Whether nothing but autograd looks on at a call on x, or changes its dtype."""
    return type(x) is Tensor and not autocasts(x) and not torch.jit.is_tracing() and is_plain(x)


def compiles_for_values(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a compiler traces a call on x, in x's dtype, that needs no gradient."""
    return torch.compiler.is_compiling() and not autocasts(x) and not wants_gradient(x, *weights)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
