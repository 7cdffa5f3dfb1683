"""A copy in contiguous memory, of a tensor with other strides, such as a weight in channels_last.

PyTorch's own copy is not a launch that a recording could contain (recording.py).
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .integers import cdiv
from .launching import launch

_BLOCK = 1024
MOST_DIMENSIONS = 4


@triton.jit(do_not_specialize=["COUNT", "B", "C", "D", "stride_a", "stride_b", "stride_c", "stride_d"])
def _copy_kernel(
    x_ptr, y_ptr, COUNT, B, C, D, stride_a, stride_b, stride_c, stride_d, BLOCK: tl.constexpr
):  # fmt: skip
    """x: (·, B, C, D), COUNT elements, any strides."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < COUNT
    row = at // D
    plane = row // C
    x_ptr += plane // B * stride_a + plane % B * stride_b + row % C * stride_c + at % D * stride_d
    tl.store(y_ptr + at, tl.load(x_ptr, mask=ok), mask=ok)


def copy(x: Any, y: Any) -> None:
    """Copy x, of at most ``MOST_DIMENSIONS`` dimensions, to y, which is contiguous and of the same shape and dtype."""
    more = MOST_DIMENSIONS - x.dim()
    sides, strides = (1,) * more + tuple(x.shape), (0,) * more + tuple(x.stride())
    count = math.prod(sides)
    launch(_copy_kernel, (cdiv(count, _BLOCK),), x, y, count, *sides[1:], *strides, BLOCK=_BLOCK)
