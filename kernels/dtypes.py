"""Dtypes as Triton names them, and how it multiplies in one."""

from __future__ import annotations

import torch
import triton.language as tl

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision``: "tf32" for float32 where PyTorch's switch allows it, else "ieee".

    ``fp32_precision``, new in PyTorch 2.9, also reflects the older switches; ``allow_tf32`` raises if the newer one was
    set.
    """
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"
