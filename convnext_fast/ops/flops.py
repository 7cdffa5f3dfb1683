"""FLOPs of the fused ops, for `torch.utils.flop_counter.FlopCounterMode`, which cannot see into them.

As that counter does for PyTorch's operators: two for each multiply-add of convolutions and linear layers, nothing else,
and what a backward computes anew because ``recompute`` did not save it. What kernels compute twice to save memory
traffic on the way is not counted; `python -m bench.machine_code` does.

Shapes: x (N, H, W, C), w1 (K, C), weights of convolutions (C', C/groups, kh, kw). An absent tensor is None or empty.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from math import prod
from typing import Any

import torch

Shape = Any  # torch.Size of a tensor, None for None

_COUNTER = "torch.utils.flop_counter"


def _convolution(pixels: int, weight: Shape) -> int:
    """Of ``pixels`` outputs a channel."""
    return 2 * pixels * prod(weight)


def _mlp(pixels: int, w1: Shape, products: int = 2) -> int:
    """Of so many products of (pixels, C) or (pixels, K) with a matrix of K·C."""
    return 2 * pixels * prod(w1) * products


def _is_absent(saved: Shape) -> bool:
    return saved is None or prod(saved) == 0


def block_fwd(
    x: Shape, dwconv_weight: Shape, dwconv_bias: Shape, g: Shape, beta: Shape, w1: Shape, *_: Any, **__: Any
) -> int:
    """The convolution and two products."""
    pixels = prod(x[:3])
    return _convolution(pixels, dwconv_weight) + _mlp(pixels, w1)


def block_bwd(dy: Shape, x: Shape, saved: list[Shape], dwconv_weight: Shape, *rest: Any, **_: Any) -> int:
    """Two convolutions and four products, and those computed anew."""
    pixels, w1 = prod(x[:3]), rest[3]
    needs_x, needs_dwconv = rest[-2:]
    convolutions = needs_x + needs_dwconv + _is_absent(saved[0])
    return convolutions * _convolution(pixels, dwconv_weight) + _mlp(pixels, w1, 4 + _is_absent(saved[2]))


def frozen_block_fwd(x: Shape, dwconv_weight: Shape, dwconv_bias: Shape, w1: Shape, *_: Any, **__: Any) -> int:
    """As `block_fwd`."""
    return block_fwd(x, dwconv_weight, dwconv_bias, None, None, w1)


def dwconv_layernorm_fwd(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """The convolution."""
    return _convolution(prod(x[:3]), weight)


def dwconv_layernorm_bwd(dn: Shape, x: Shape, u: Shape, statistics: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Two convolutions."""
    return 2 * _convolution(prod(x[:3]), weight)


def pointwise_mlp_fwd(x: Shape, residual: Shape, w1: Shape, *_: Any, **__: Any) -> int:
    """Two products."""
    return _mlp(prod(x[:3]), w1)


def pointwise_mlp_bwd(dy: Shape, x: Shape, a: Shape, w1: Shape, *_: Any, **__: Any) -> int:
    """Four products, and the one computed anew."""
    return _mlp(prod(x[:3]), w1, 4 + _is_absent(a))


def patchify_stem_fwd(image: Shape, weight: Shape, *_: Any, out_shape: Shape) -> int:
    """The convolution; image (N, C, H, W)."""
    return _convolution(prod(out_shape[:3]), weight)


def patchify_stem_bwd(dy: Shape, image: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """The convolution anew, its weight's gradient, and the image's if needed."""
    return (2 + rest[-1]) * _convolution(prod(dy[:3]), weight)


def downsample_fwd(x: Shape, g: Shape, beta: Shape, weight: Shape, *_: Any, out_shape: Shape) -> int:
    """The convolution."""
    return _convolution(prod(out_shape[:3]), weight)


def frozen_downsample_fwd(x: Shape, weight: Shape, *_: Any, out_shape: Shape) -> int:
    """The convolution."""
    return _convolution(prod(out_shape[:3]), weight)


def downsample_bwd(dy: Shape, x: Shape, g: Shape, beta: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Two convolutions."""
    return 2 * _convolution(prod(dy[:3]), weight)


FORMULAS: tuple[Callable[..., int], ...] = (
    block_fwd,
    block_bwd,
    frozen_block_fwd,
    dwconv_layernorm_fwd,
    dwconv_layernorm_bwd,
    pointwise_mlp_fwd,
    pointwise_mlp_bwd,
    patchify_stem_fwd,
    patchify_stem_bwd,
    downsample_fwd,
    frozen_downsample_fwd,
    downsample_bwd,
)
"""Named as the operators, of whose arguments they take the shapes."""


def tell_counters() -> None:
    """Make the formulas known to the flop counters that look on.

    Importing PyTorch's counter to register them beforehand would take half a second, for Triton comes with it.
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
    """By operator, those of compiled graphs on a CPU included, as ``module`` registers them."""
    namespace, found = torch.ops.convnext_fast, {}
    for formula in FORMULAS:
        for name in (formula.__name__, f"{formula.__name__}_cpu"):
            if hasattr(namespace, name):
                found[getattr(namespace, name)] = module.shape_wrapper(formula)
    return found
