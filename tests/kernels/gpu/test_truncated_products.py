"""The eager TF32 that kernels are compared with multiplies what tensor cores see, and changes nothing else."""

import pytest
import torch
import torch.nn.functional as F
from kernel_support import TruncatedProducts, assert_as_good_as_eager, truncated


def test_truncation_keeps_ten_bits_of_the_mantissa():
    x = torch.tensor([1 + 2**-10, 1 + 2**-10 + 2**-11, -1 - 2**-11 - 2**-23, 2.0**-120, float("inf")])
    assert torch.equal(truncated(x), torch.tensor([1 + 2**-10, 1 + 2**-10, -1.0, 2.0**-120, float("inf")]))


@pytest.mark.parametrize("dims", [2, 4])
def test_linear_forward_and_backward(dims):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*(2,) * (dims - 2), 9, 24), torch.randn(16, 24), torch.randn(16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    dy = torch.randn(*x.shape[:-1], 16)
    with TruncatedProducts():
        y = F.linear(*leaves)
        grads = torch.autograd.grad(y, leaves, dy)
    x, weight, dz = (truncated(t.detach()) for t in (x, weight, dy))
    torch.testing.assert_close(y, F.linear(x, weight, bias))  # not bit for bit: threads split the sums

    def gradients(dtype):
        rows, inputs = dz.flatten(0, -2).to(dtype), x.flatten(0, -2).to(dtype)
        return dz.to(dtype) @ weight.to(dtype), rows.t() @ inputs, dy.flatten(0, -2).to(dtype).sum(0)

    for got, eager, exact in zip(grads, gradients(torch.float32), gradients(torch.float64), strict=True):
        assert_as_good_as_eager(got, eager, exact)


@pytest.mark.parametrize("groups", [1, 8])
def test_dense_convolutions_are_truncated_and_depthwise_ones_exact(groups):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8 // groups, 2, 2)
    leaves = [t.requires_grad_() for t in (x, weight, torch.randn(8))]
    with TruncatedProducts():
        y = F.conv2d(*leaves, stride=2, groups=groups)
        grads = torch.autograd.grad(y, leaves, y.detach())
    cut = truncated if groups == 1 else torch.clone
    torch.testing.assert_close(y, F.conv2d(*(cut(t.detach()) for t in leaves[:2]), leaves[2], stride=2, groups=groups))

    def gradients(dtype):
        twins = [cut(t.detach()).to(dtype).requires_grad_() for t in leaves[:2]]
        again = F.conv2d(*twins, stride=2, groups=groups)
        found = torch.autograd.grad(again, twins, cut(y.detach()).to(dtype))
        return (*found, y.detach().to(dtype).sum((0, 2, 3)))

    for got, eager, exact in zip(grads, gradients(torch.float32), gradients(torch.float64), strict=True):
        assert_as_good_as_eager(got, eager, exact)
