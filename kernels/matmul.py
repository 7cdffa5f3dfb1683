"""Library GEMMs whose result is not rounded to 16 bits, for the gradients of weights."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left (M, P)·right (P, N) in float32, from operands of one dtype; float32 ones follow PyTorch's TF32 switch.

    CUDA's library takes 16-bit operands and writes its float32 sums; elsewhere the operands are widened first.
    """
    if left.dtype != torch.float32 and left.is_cuda and not torch.version.hip:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
