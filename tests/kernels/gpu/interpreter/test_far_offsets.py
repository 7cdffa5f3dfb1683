"""Element indices beyond 2^31: the last program of a launch over huge tensors, of which only the end is accessed."""

import pytest
import torch
from convnext_fast.kernels.dwconv import scalar, tensor_core, wgrad
from kernel_support import assert_as_good_as_eager, dwconv_gradients, dwconv_reference

SHAPE = (2**31 // (7 * 7 * 16) + 40, 7, 7, 16)
TAIL = 8  # images that hold data


def _far(reserve, seed):
    x = reserve(SHAPE, dtype=torch.float16)
    torch.manual_seed(seed)
    x[-TAIL - 16 :] = torch.randn((TAIL + 16, *SHAPE[1:])).half()
    return x


@pytest.mark.parametrize("form", ["tensor cores", "scalar"])
def test_forward(last_program, form):
    x, weight = _far(last_program, 0), torch.randn(16, 1, 7, 7) / 7
    mode = {"out_dtype": torch.float16, "flip": False, "statistics": True}
    if form == "scalar":
        u, stats = scalar.dwconv_scalar(x, weight, None, None, **mode)
    else:
        u, stats = tensor_core.dwconv_tensor_core(x, weight, None, None, dtype=torch.float16, **mode)
    end = x[-1:]
    reference = dwconv_reference(end.double(), weight.double(), None)
    assert_as_good_as_eager(u[-1:], dwconv_reference(end, weight, None), reference)
    torch.testing.assert_close(stats[0, -49:, 0], u[-1].float().mean(-1).flatten(), rtol=1e-5, atol=1e-6)


def test_weight_gradient(last_program, allocated):
    x, du = _far(last_program, 1), _far(last_program, 2)
    config = wgrad.WgradConfig(8, 16, 16, 1, 8)
    wgrad.dwconv_wgrad(x, du, 7, config)
    taken = SHAPE[0] - (SHAPE[0] - 1) // 16 * 16
    x, du = x[-taken:], du[-taken:]
    weight = torch.randn(16, 1, 7, 7)
    _, reference, _ = dwconv_gradients(x.double(), weight.double(), du.double())
    _, eager, _ = dwconv_gradients(x, weight, du)
    dw = allocated[0][-1, :, :7].permute(2, 0, 1)[:, None]
    assert_as_good_as_eager(dw, eager, reference, terms=49 * taken)
