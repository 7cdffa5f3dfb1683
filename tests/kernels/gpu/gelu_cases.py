"""A kernel around the GELU device functions, walked over every input of a 16-bit type, and the bounds it must keep."""

import math

import torch
import triton
import triton.language as tl
from convnext_fast.kernels.gelu import gelu, gelu_and_grad

BLOCK = 4096
BELOW = {  # largest absolute error for x < -3
    (torch.bfloat16, "GELU"): 2.2e-5,
    (torch.bfloat16, "GELU'"): 3.3e-5,
    (torch.float16, "GELU"): 2.0e-6,
    (torch.float16, "GELU'"): 2.9e-5,
}


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, d_ptr, FORM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.float32)
    _, d = gelu_and_grad(x, FORM)
    tl.store(y_ptr + at, gelu(x, FORM).to(y_ptr.dtype.element_ty))
    tl.store(d_ptr + at, d.to(d_ptr.dtype.element_ty))


def all_inputs(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit float type, infinities and NaNs included."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def run(x: torch.Tensor, out_dtype: torch.dtype, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    y, d = torch.empty_like(x, dtype=out_dtype), torch.empty_like(x, dtype=out_dtype)
    _gelu_kernel[(x.numel() // BLOCK,)](x, y, d, FORM=form, BLOCK=BLOCK)
    return y, d


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU and its derivative in float64, by erfc, which keeps its digits for negative x."""
    x = x.double()
    cdf = torch.special.erfc(-x / math.sqrt(2)) / 2
    return x * cdf, cdf + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance of two tensors of a 16-bit float type in units of the last place (−0 is 0)."""

    def order(v):
        bits = v.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (order(a) - order(b)).abs()


def check_bounds(x: torch.Tensor, y: torch.Tensor, d: torch.Tensor) -> None:
    """The bounds of kernels/gelu.py for ``y``, ``d`` = GELU(x), GELU′(x) rounded to the type of ``x``."""
    want_y, want_d = exact(x)
    for name, got, want in (("GELU", y, want_y), ("GELU'", d, want_d)):
        rounded = want.to(x.dtype)
        assert torch.equal(got.isnan(), rounded.isnan()), f"{name}: NaN in other places"
        assert torch.equal(got.isinf(), rounded.isinf()), f"{name}: infinities in other places"
        finite = torch.isfinite(rounded)
        right = finite & (x.float() >= -3)
        allowed = torch.where((x == -0.751953125) & (x.dtype == torch.float16) & (name == "GELU'"), 3, 1)
        far = ulps(got, rounded) - allowed
        assert far[right].max() <= 0, f"{name}: {far[right].max()} ulp too far at {x[right][far[right].argmax()]}"
        error = (got.double() - want).abs()[finite & ~right].max()
        assert error <= BELOW[x.dtype, name], f"{name}: {error:.2e} absolute below -3"
