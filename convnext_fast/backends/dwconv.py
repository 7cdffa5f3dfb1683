"""The depthwise convolution as the GPU's ops call it: as a launch, or in a compiler's graph as an operator.

Inductor rewrites the Triton kernels in a graph as ``triton.jit`` functions, which is not possible for Gluon kernels. So
the forms with explicit layouts enter a traced graph as the operators ``convnext_fast::dwconv`` and
``dwconv_wgrad_sums``, which Inductor calls unchanged. Compiled models thus run the same kernels as eager ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import dwconv as kernels
from ..kernels.integers import cdiv
from ..kernels.launching import is_traced
from ..kernels.replaying import replayed
from ..kernels.statistics import stats_block


def dwconv_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`kernels.dwconv.dwconv_fwd`."""
    if _is_opaque(x, dtype):
        return dwconv(x, weight, bias, None, dtype, dtype, False, True)
    return kernels.dwconv_fwd(x, weight, bias, dtype)


def dwconv_dgrad(du: Tensor, weight: Tensor, residual: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`kernels.dwconv.dwconv_dgrad`."""
    if _is_opaque(du, du.dtype):
        return dwconv(du, weight, None, residual, du.dtype, out_dtype, True, False)[0]
    return kernels.dwconv_dgrad(du, weight, residual, out_dtype)


def dwconv_wgrad_partials(x: Tensor, du: Tensor, taps: int) -> Tensor:
    """`kernels.dwconv.dwconv_wgrad_partials`."""
    if _is_opaque(x, du.dtype):
        return dwconv_wgrad_sums(x, du, taps)
    return kernels.dwconv_wgrad_partials(x, du, taps)


def dwconv_wgrad(x: Tensor, du: Tensor, taps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`kernels.dwconv.dwconv_wgrad`."""
    return kernels.add_partials(dwconv_wgrad_partials(x, du, taps), dtype)


def _is_opaque(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a compiler traces a call on x that runs the form with explicit layouts."""
    return dtype != torch.float32 and is_traced(x) and kernels.gluon_supports(x)


_launch = replayed(kernels.dwconv)  # called by compiled code that launches the other kernels itself
_launch_wgrad = replayed(kernels.dwconv_wgrad_partials)


@torch.library.custom_op("convnext_fast::dwconv", mutates_args=())
def dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    flip: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """`kernels.dwconv.dwconv`, with an empty tensor for missing statistics. Alignment is known only when this runs."""
    u, stats = _launch(x, weight, bias, residual, dtype, out_dtype, flip, statistics)
    return u, x.new_empty(0) if stats is None else stats


@dwconv.register_fake
def _(x, weight, bias, residual, dtype, out_dtype, flip, statistics):
    batch, height, width, channels = x.shape
    blocks = cdiv(channels, stats_block(channels, dtype))
    u = x.new_empty(x.shape, dtype=out_dtype)
    shape = (blocks, batch * height * width, 2) if statistics else (0,)
    return u, x.new_empty(shape, dtype=torch.float32 if statistics else x.dtype)


@torch.library.custom_op("convnext_fast::dwconv_wgrad_sums", mutates_args=())
def dwconv_wgrad_sums(x: Tensor, du: Tensor, taps: int) -> Tensor:
    """`kernels.dwconv.dwconv_wgrad_partials` in the form whose shape the graph has; unaligned tensors are copied."""
    x, du = (t if kernels.gluon_supports(t) else t.clone() for t in (x, du))
    return _launch_wgrad(x, du, taps)


@dwconv_wgrad_sums.register_fake
def _(x, du, taps):
    return x.new_empty(kernels.dwconv_wgrad_shape(x, taps), dtype=torch.float32)
