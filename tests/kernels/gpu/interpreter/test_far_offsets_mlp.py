"""Element indices beyond 2^31 in the MLP, LayerNorm and patchify: the last program of launches over huge tensors."""

import pytest
import torch
import torch.nn.functional as F
from convnext_fast.kernels.layernorm import layernorm_bwd, layernorm_fwd
from convnext_fast.kernels.mlp import fused_bwd
from convnext_fast.kernels.mlp.fused import fused_mlp_fwd
from convnext_fast.kernels.mlp.fused_bwd import fused_mlp_bwd
from convnext_fast.kernels.mlp.gemm import fc1, fc2
from convnext_fast.kernels.mlp.tuning import FusedConfig
from convnext_fast.kernels.patchify.fwd import downsample_fwd, stem_fwd
from kernel_support import assert_as_good_as_eager

C = K = 64
P = 2**31 // C + 128 + 16
TAIL = 16  # rows of the last program, for any tile
EPS = 1e-6


def far(reserve, shape, seed, dtype=torch.float16):
    """A tensor of which only the last ``TAIL`` rows hold data."""
    x = reserve(shape, dtype=dtype)
    torch.manual_seed(seed)
    x[-TAIL:] = torch.randn((TAIL, *shape[1:])).to(dtype)
    return x


def far_statistics(reserve, u):
    """(2, P, 2): statistics of two blocks of 32 channels of the tail of u."""
    stats = reserve((2, u.shape[0], 2), dtype=torch.float32)
    for b, block in enumerate(u[-TAIL:].float().split(32, dim=1)):
        stats[b, -TAIL:, 0] = block.mean(1)
        stats[b, -TAIL:, 1] = block.var(1, correction=0) * 32
    return stats


@pytest.fixture
def given(last_program):
    u, residual = far(last_program, (P, C), 0), far(last_program, (P, C), 1)
    torch.manual_seed(2)
    w1, w2 = (torch.randn(K, C) / 8).half(), (torch.randn(C, K) / 8).half()
    b1g = torch.stack((torch.randn(K), w1.float().sum(1)))
    return u, far_statistics(last_program, u), residual, w1, b1g, w2


def mlp(u, residual, w1, b1, w2, dtype):
    u, residual, w1, b1, w2 = (each.to(dtype) for each in (u, residual, w1, b1, w2))
    a = F.linear(F.layer_norm(u, (C,), eps=EPS), w1, b1)
    return a, residual + F.linear(F.gelu(a), w2)


def test_fused_forward(given):
    u, stats, residual, w1, b1g, w2 = given
    y, a = fused_mlp_fwd(u, stats, residual, w1, b1g, w2, None, None, None, EPS, "gelu", True)
    ends = (u[-TAIL:], residual[-TAIL:], w1, b1g[0], w2)
    for got, eager, want in zip((a, y), mlp(*ends, torch.float16), mlp(*ends, torch.float64), strict=True):
        assert_as_good_as_eager(got[-TAIL:], eager, want)


def test_fc1(given):
    u, stats, _, w1, b1g, _ = given
    h, a, _ = fc1(u, stats, w1, b1g, EPS, "relu", True)
    ends = (u[-TAIL:], u[-TAIL:], w1, b1g[0], w1)
    eager, want = mlp(*ends, torch.float16)[0], mlp(*ends, torch.float64)[0]
    assert_as_good_as_eager(a[-TAIL:], eager, want)
    assert_as_good_as_eager(h[-TAIL:], eager.relu(), want.relu())


def test_fc2(given):
    h, _, residual, _, _, w2 = given
    y = fc2(h, w2, residual, None, None, None)
    eager, want = (
        residual[-TAIL:].to(dtype) + F.linear(h[-TAIL:].to(dtype), w2.to(dtype))
        for dtype in (torch.float16, torch.float64)
    )
    assert_as_good_as_eager(y[-TAIL:], eager, want)


def gradients(dy, u, w1, b1, w2, dtype):
    """(du, D, E) of the ends, by autograd and by the identities of the backward, in ``dtype``."""
    dy, u, w1, b1, w2 = (each.to(dtype) for each in (dy, u, w1, b1, w2))
    u.requires_grad_()
    x = F.layer_norm(u, (C,), eps=EPS)
    a = F.linear(x, w1, b1).detach().requires_grad_()
    h = F.gelu(a)
    (da,) = torch.autograd.grad(F.linear(h, w2), a, dy)
    (du,) = torch.autograd.grad(F.linear(x, w1, b1), u, da)
    return du, da.t() @ x.detach(), h.detach().t() @ dy


def test_fused_backward_of_the_input(given):
    u, stats, dy, w1, b1g, w2 = given
    du, _ = fused_mlp_bwd(dy, u, stats, None, w1, b1g, w2, None, EPS, "gelu")
    ends = (dy[-TAIL:], u[-TAIL:], w1, b1g[0], w2)
    eager, want = gradients(*ends, torch.float16)[0], gradients(*ends, torch.float64)[0]
    assert_as_good_as_eager(du[-TAIL:], eager, want)


@pytest.mark.parametrize("last_program", [1], indirect=True)
def test_fused_backward_of_the_weights(given, monkeypatch):
    u, stats, dy, w1, b1g, w2 = given
    # The rows before the tail in a share of 1,024 rows hold zeros.
    monkeypatch.setattr(fused_bwd, "weight_grad_config", lambda *_: (FusedConfig(32, 64, 4, 1), 1024))
    _, sums = fused_mlp_bwd(dy, u, stats, None, w1, b1g, w2, None, EPS, "gelu")
    ends = (dy[-TAIL:], u[-TAIL:], w1, b1g[0], w2)
    for got, eager, want in zip(
        sums.products[:, -1], gradients(*ends, torch.float16)[1:], gradients(*ends, torch.float64)[1:], strict=True
    ):
        assert_as_good_as_eager(got, eager, want, terms=TAIL)


def test_layernorm(given):
    u, stats, *_ = given
    n = layernorm_fwd(u, stats, None, None, EPS)
    end = u[-TAIL:]
    assert_as_good_as_eager(n[-TAIL:], F.layer_norm(end, (C,), eps=EPS), F.layer_norm(end.double(), (C,), eps=EPS))


def test_layernorm_backward(given):
    u, stats, dn, *_ = given
    du, _, _ = layernorm_bwd(dn, u, stats, None, EPS)
    end = u[-TAIL:].double().requires_grad_()
    (want,) = torch.autograd.grad(F.layer_norm(end, (C,), eps=EPS), end, dn[-TAIL:].double())
    assert_as_good_as_eager(du[-TAIL:], want.half(), want)


def test_stem(last_program):
    image = far(last_program, (P, 5, 4, 4), 0)
    weight, bias = torch.randn(C, 5, 4, 4) / 9, torch.randn(C)
    out = stem_fwd(image, weight, bias, torch.ones(C), torch.zeros(C), EPS, torch.float16, torch.float16)
    eager, want = (
        F.layer_norm(F.conv2d(image[-TAIL:].to(dtype), weight.to(dtype), bias.to(dtype)).flatten(1), (C,), eps=EPS)
        for dtype in (torch.float16, torch.float64)
    )
    assert_as_good_as_eager(out[-TAIL:].flatten(1), eager, want)


def test_downsample(last_program):
    images, wide = 2**31 // (4 * C) + TAIL, 4 * C
    x = far(last_program, (images, 2, 2, C), 0)
    weight, bias = (torch.randn(wide, 2, 2, C) / 16).half(), torch.randn(wide)
    out = downsample_fwd(x, weight, bias, EPS, torch.float16)
    eager, want = (
        F.linear(
            F.layer_norm(x[-TAIL:].to(dtype), (C,), eps=EPS).flatten(1), weight.to(dtype).flatten(1), bias.to(dtype)
        )
        for dtype in (torch.float16, torch.float64)
    )
    last = slice(-32, None)  # columns of the last program
    assert_as_good_as_eager(out[-TAIL:].flatten(1)[:, last], eager[:, last], want[:, last])
