"""FLOPs of the fused ops, for `torch.utils.flop_counter.FlopCounterMode`, which cannot see into them.

As that counter does for PyTorch's operators, these count two for each multiply-add of convolutions and linear layers,
and nothing else. What a backward computes again because ``recompute`` did not save it counts, too. What kernels compute
twice to save memory traffic does not count; `python -m bench.machine_code` counts it.

The formulas take the arguments of `interface.Backend`, with the shape of each tensor in its place; the shape of an
absent one is None or has no elements.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from math import prod
from typing import Any

import torch

from .signatures import SIGNATURES

Shape = Any  # torch.Size of a tensor, None for None

_COUNTER = "torch.utils.flop_counter"


def _convolution(pixels: int, weight: Shape) -> int:
    """A convolution with ``pixels`` outputs a channel; weight: (C', C/groups, kh, kw)."""
    return 2 * pixels * prod(weight)


def _mlp(pixels: int, w1: Shape, products: int = 2) -> int:
    """``products`` products of a (pixels, C) or (pixels, K) matrix with one of K·C elements."""
    return 2 * pixels * prod(w1) * products


def _is_absent(saved: Shape) -> bool:
    return saved is None or prod(saved) == 0


def block_fwd(x: Shape, weights: Any, *_: Any, **__: Any) -> int:
    """The convolution and two products."""
    pixels = prod(x[:3])
    return _convolution(pixels, weights.dwconv_weight) + _mlp(pixels, weights.w1)


frozen_block_fwd = block_fwd


def block_bwd(dy: Shape, x: Shape, saved: Any, weights: Any, *options: Any, **_: Any) -> int:
    """Two convolutions and four products, and those computed again."""
    pixels, (*_, needs_x, needs_dwconv) = prod(x[:3]), options
    convolutions = needs_x + needs_dwconv + _is_absent(saved.u)
    products = 4 + _is_absent(saved.a)
    return convolutions * _convolution(pixels, weights.dwconv_weight) + _mlp(pixels, weights.w1, products)


def dwconv_layernorm_fwd(x: Shape, weights: Any, *_: Any, **__: Any) -> int:
    """The convolution."""
    return _convolution(prod(x[:3]), weights.weight)


def dwconv_layernorm_bwd(dn: Shape, x: Shape, u: Shape, statistics: Shape, weights: Any, *_: Any, **__: Any) -> int:
    """Two convolutions."""
    return 2 * _convolution(prod(x[:3]), weights.weight)


def pointwise_mlp_fwd(x: Shape, residual: Shape, weights: Any, *_: Any, **__: Any) -> int:
    """Two products."""
    return _mlp(prod(x[:3]), weights.w1)


def pointwise_mlp_bwd(dy: Shape, x: Shape, a: Shape, weights: Any, *_: Any, **__: Any) -> int:
    """Four products, and the one computed again."""
    return _mlp(prod(x[:3]), weights.w1, 4 + _is_absent(a))


def patchify_stem_fwd(x: Shape, weights: Any, *_: Any, out_shape: Shape) -> int:
    """The convolution."""
    return _convolution(prod(out_shape[:3]), weights.weight)


downsample_fwd = frozen_downsample_fwd = patchify_stem_fwd


def patchify_stem_bwd(
    dy: Shape, x: Shape, weights: Any, eps: float = 0.0, dtype: Any = None, needs_x: bool = True, **_: Any
) -> int:
    """The convolution again, its weight's gradient, and the image's if needed."""
    return (2 + needs_x) * _convolution(prod(dy[:3]), weights.weight)


def downsample_bwd(dy: Shape, x: Shape, weights: Any, *_: Any, **__: Any) -> int:
    """Two convolutions."""
    return 2 * _convolution(prod(dy[:3]), weights.weight)


def register_formulas() -> None:
    """Make the formulas known to the FLOP counters that observe this call.

    Importing PyTorch's counter to register them beforehand would take half a second, because it imports Triton.
    """
    module = sys.modules.get(_COUNTER)
    if module is None:
        return
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for operator, formula in _formulas(module).items():
                counter.flop_registry.setdefault(operator, formula)


@functools.cache
def _formulas(module: Any) -> dict[Any, Callable[..., int]]:
    """By operator, including those in compiled graphs, in the form that ``module`` registers."""
    namespace, found = torch.ops.convnext_fast, {}
    for op in SIGNATURES:
        for name in (op, f"{op}_cpu", f"{op}_gpu"):
            if hasattr(namespace, name):
                found[getattr(namespace, name)] = module.shape_wrapper(_of_flat(op))
    return found


def _of_flat(op: str) -> Callable[..., int]:
    formula, signature = globals()[op], SIGNATURES[op]

    @functools.wraps(formula)
    def flat(*shapes: Any, **options: Any) -> int:
        return formula(*signature.group(shapes), **options)

    return flat
