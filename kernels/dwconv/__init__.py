"""Depthwise convolution with LayerNorm's statistics, forward and backward: the launchers that choose the form.

float16 and bfloat16 run on tensor cores: on NVIDIA in the form with explicit layouts where supported (gluon.py),
elsewhere in the portable one (tensor_core.py). float32 runs on scalar multiply-adds (scalar.py). The weight gradient
likewise: gluon_wgrad.py and wgrad.py. All tensors are contiguous and NHWC; k is 3, 5 or 7, stride 1, padding k//2. The
compute dtype T and the dtype R of the residual stream may differ: under autocast y is float32, and x is either.
"""

from __future__ import annotations

import torch

from .gluon import dwconv_gluon
from .gluon import supports as gluon_supports
from .gluon_wgrad import dwconv_wgrad_shape as dwconv_wgrad_shape
from .scalar import dwconv_scalar
from .tensor_core import dwconv_tensor_core
from .wgrad import add_partials as add_partials
from .wgrad import dwconv_wgrad as dwconv_wgrad
from .wgrad import dwconv_wgrad_partials as dwconv_wgrad_partials


def dwconv_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, stats): u (N, H, W, C) in ``dtype``, the compute dtype T, and its partial LayerNorm statistics.

    ``x`` (N, H, W, C) in T or R; ``weight`` (C, 1, k, k) and ``bias`` (C,) or None in any float dtype, rounded to T as
    x is (the bias is not). stats is float32 (⌈C/CB⌉, N·H·W, 2), see statistics.py, CB = ``stats_block(C, dtype)``.
    """
    u, stats = dwconv(x, weight, bias, None, dtype, dtype, flip=False, statistics=True)
    assert stats is not None
    return u, stats


def dwconv_dgrad(
    du: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """dx (N, H, W, C) = residual + the gradient at the convolution's input, in ``out_dtype``, that of x.

    ``du`` (N, H, W, C) is the gradient at the convolution's output in T; ``residual`` (N, H, W, C), the gradient of the
    block's output, reaches x unchanged through the skip connection. Without one nothing is added.
    """
    return dwconv(du, weight, None, residual, du.dtype, out_dtype, flip=True, statistics=False)[0]


def dwconv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    flip: bool,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(residual + dwconv(x) + bias in ``out_dtype``, statistics or None) in the form that supports ``x``.

    ``dtype`` is T; ``flip`` mirrors the taps, which makes it the data gradient.
    """
    form = dwconv_scalar if dtype == torch.float32 else dwconv_gluon if gluon_supports(x) else dwconv_tensor_core
    given = {} if form is dwconv_scalar else {"dtype": dtype}
    return form(x, weight, bias, residual, out_dtype=out_dtype, flip=flip, statistics=statistics, **given)
