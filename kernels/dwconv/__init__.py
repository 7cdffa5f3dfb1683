"""Depthwise convolution with LayerNorm's statistics, forward and backward: the launchers that choose the form.

float16 and bfloat16 run on tensor cores: on NVIDIA in the form with explicit layouts where it serves (dwconv_gluon.py),
elsewhere in the portable one (dwconv_tensor_core.py). float32 runs on scalar multiply-adds (dwconv_scalar.py). The
weight gradient is dwconv_wgrad.py. All tensors are contiguous and NHWC; k is 3, 5 or 7, stride 1, padding k//2.
The compute dtype T and the dtype R of the residual stream may differ: under autocast x and y are float32.

Inductor writes the Triton kernels that it finds in a graph anew, as ``triton.jit`` functions, which a Gluon kernel is
not. So the form with explicit layouts enters a traced graph as the operator ``convnext_fast::dwconv``, which Inductor
calls as it is: compiled models run the kernel that eager ones run.
"""

from __future__ import annotations

from typing import Any

import torch

from ..integers import cdiv
from ..launching import traced
from ..replaying import replayed
from ..statistics import stats_block
from .gluon import dwconv_gluon, serves
from .scalar import dwconv_scalar
from .tensor_core import dwconv_tensor_core
from .wgrad import dwconv_wgrad as _wgrad


def dwconv_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, stats): u (N, H, W, C) in ``dtype``, the compute dtype T, and its partial LayerNorm statistics.

    ``x`` (N, H, W, C) in T or R; ``weight`` (C, 1, k, k) and ``bias`` (C,) or None in any float dtype, rounded to T as
    x is (the bias is not). stats is float32 (⌈C/CB⌉, N·H·W, 2), see statistics.py, CB = ``stats_block(C, dtype)``.
    """
    if dtype == torch.float32:
        return dwconv_scalar(x, weight, bias, None, out_dtype=dtype, flip=False, statistics=True)
    return _tensor_cores(x, weight, bias, None, dtype, dtype, False, True)


def dwconv_dgrad(du: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """dx (N, H, W, C) = residual + the gradient at the convolution's input, in the dtype R of ``residual``.

    ``du`` (N, H, W, C) is the gradient at the convolution's output in T; ``residual`` (N, H, W, C), the gradient of the
    block's output, reaches x unchanged through the skip connection. Without one nothing is added and dx is in T.
    """
    out_dtype = du.dtype if residual is None else residual.dtype
    if du.dtype == torch.float32:
        return dwconv_scalar(du, weight, None, residual, out_dtype=out_dtype, flip=True, statistics=False)[0]
    return _tensor_cores(du, weight, None, residual, du.dtype, out_dtype, True, False)[0]


def dwconv_wgrad(
    x: torch.Tensor, du: torch.Tensor, taps: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dweight (C, 1, k, k), dbias (C,)) in ``dtype``, k = ``taps``, from x (T or R) and ``du`` (T), (N, H, W, C)."""
    return _wgrad(x, du, taps, dtype=dtype)


def _tensor_cores(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(u, stats or None) of `_launch`, as a launch or, where a compiler traces, as an operator."""
    x, statistics = arguments[0], arguments[-1]
    if traced(x) and serves(x):
        u, stats = dwconv(*arguments)
        return u, stats if statistics else None
    return _launch(*arguments)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    flip: bool,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(u, stats or None) in the form that serves ``x``."""
    form = dwconv_gluon if serves(x) else dwconv_tensor_core
    return form(x, weight, bias, residual, dtype=dtype, out_dtype=out_dtype, flip=flip, statistics=statistics)


_launch_again = replayed(_launch)  # in a compiled model the only call of ours that the host makes anew


@torch.library.custom_op("convnext_fast::dwconv", mutates_args=())
def dwconv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    flip: bool,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a compiler calls; a tensor that is not aligned for explicit layouts shows only now. No stats: empty."""
    u, stats = _launch_again(x, weight, bias, residual, dtype, out_dtype, flip, statistics)
    return u, x.new_empty(0) if stats is None else stats


@dwconv.register_fake
def _(x, weight, bias, residual, dtype, out_dtype, flip, statistics):
    batch, height, width, channels = x.shape
    blocks = cdiv(channels, stats_block(channels, dtype))
    u = x.new_empty(x.shape, dtype=out_dtype)
    shape = (blocks, batch * height * width, 2) if statistics else (0,)
    return u, x.new_empty(shape, dtype=torch.float32 if statistics else x.dtype)
