"""A kernel around ``merge_statistics`` and what it must give, for the interpreter and for executed machine code."""

import torch
import triton
import triton.language as tl
from convnext_fast.kernels.statistics import merge_statistics
from kernel_support import merged_statistics

CASES = [(1, 16, 5), (3, 16, 70), (16, 16, 64), (40, 16, 33), (100, 32, 64), (768, 32, 40), (4096, 32, 7)]


@triton.jit
def _merge_kernel(stats_ptr, mean_ptr, rstd_ptr, P, C, eps, CB: tl.constexpr, NB: tl.constexpr, BLOCK_M: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < P
    mean, rstd = merge_statistics(stats_ptr, tl.where(rows_ok, rows, 0), rows_ok, P, C, eps, CB, NB)
    tl.store(mean_ptr + rows, mean, mask=rows_ok)
    tl.store(rstd_ptr + rows, rstd, mask=rows_ok)


def partial_statistics(u: torch.Tensor, block: int) -> torch.Tensor:
    """Statistics (NB, P, 2) float32 of ``u`` (P, C), computed in float64."""
    parts = [torch.stack((p.mean(1), p.var(1, correction=0) * p.shape[1]), 1) for p in u.double().split(block, dim=1)]
    return torch.stack(parts).float()


def check_merge(channels: int, block: int, pixels: int) -> None:
    """Merged statistics of pixels whose mean is up to 1,000 times their deviation, to a few float32 roundings."""
    torch.manual_seed(0)
    eps = 1e-6
    u = torch.randn(pixels, channels) + torch.logspace(-2, 3, pixels)[:, None]
    stats = partial_statistics(u, block)
    mean, rstd = torch.empty(pixels), torch.empty(pixels)
    _merge_kernel[(triton.cdiv(pixels, 16),)](
        stats, mean, rstd, pixels, channels, eps, CB=block, NB=stats.shape[0], BLOCK_M=16
    )
    want_mean, want_var = merged_statistics(stats, block, channels)
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (want_var + eps).rsqrt(), rtol=1e-5, atol=0)
