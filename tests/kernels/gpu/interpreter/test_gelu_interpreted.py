import pytest
import torch
from convnext_fast.kernels.gelu import gelu_form
from gelu_cases import all_inputs, check_bounds, exact, run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_gelu_over_every_input(dtype):
    x = all_inputs(dtype)
    y, d = run(x.float(), torch.float32, form=gelu_form(dtype))
    check_bounds(x, y.to(dtype), d.to(dtype))


def test_exact_gelu_in_float32():
    x = torch.linspace(-12, 12, 8192)
    y, d = run(x, torch.float32, form="exact")
    want_y, want_d = exact(x)
    torch.testing.assert_close(y.double(), want_y, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(d.double(), want_d, rtol=2e-7, atol=5e-7)
