"""Backward launches in a compiler's graph: one graph serves any batch, though their sums are split by the batch."""

import pytest
import torch
from convnext_fast.kernels.folding import fold_fwd
from convnext_fast.kernels.mlp import mlp_bwd
from convnext_fast.kernels.patchify.bwd import downsample_bwd, stem_bwd
from convnext_fast.kernels.weights import BlockWeights
from torch.fx.experimental.proxy_tensor import make_fx

from convnext_fast.backends.dwconv import dwconv_wgrad

C, K, EPS = 24, 32, 1e-6


def weight_gradient(g, batch):
    x, du = (torch.randn(batch, 9, 10, C, generator=g).half() for _ in range(2))
    return lambda x, du: dwconv_wgrad(x, du, 7, torch.float32), (x, du)


def stem(g, batch):
    weight, vectors = torch.randn(C, 3, 4, 4, generator=g), torch.randn(3, C, generator=g)
    image, dout = torch.randn(batch, 3, 8, 12, generator=g).half(), torch.randn(batch, 2, 3, C, generator=g).half()
    return lambda image, dout: stem_bwd(dout, image, weight, *vectors, EPS, torch.half, True), (image, dout)


def downsample(g, batch):
    weight, bias = torch.randn(K, C, 2, 2, generator=g), torch.randn(K, generator=g)
    affine = torch.randn(2, C, generator=g)
    x, dout = torch.randn(batch, 4, 6, C, generator=g).half(), torch.randn(batch, 2, 3, K, generator=g).half()
    return lambda x, dout: downsample_bwd(dout, x, weight, bias, *affine, EPS, torch.half), (x, dout)


def mlp(channels):
    def made(g, batch):
        w1, w2 = torch.randn(K, channels, generator=g), torch.randn(channels, K, generator=g)
        u, dy = (torch.randn(batch * 9 * channels, generator=g).half() for _ in range(2))
        weights = fold_fwd(BlockWeights(None, None, None, None, w1, None, w2, None, None), torch.half, False)

        def call(u, dy):
            u, dy = u.view(-1, channels), dy.view(-1, channels)  # the width is a number, as a parameter's is
            du, sums = mlp_bwd(dy, u, None, None, *weights, None, EPS, "gelu")
            return du, sums.products.sum(1), sums.db1.sum(0), sums.dz.sum(0)

        return call, (u, dy)

    return made


@pytest.mark.parametrize(
    "case", [weight_gradient, stem, downsample, mlp(C), mlp(144)], ids=["wgrad", "stem", "downsample", "narrow", "wide"]
)
def test_one_graph_serves_any_batch(case, emulating):
    with emulating(arch=80):
        call, tensors = case(torch.Generator().manual_seed(0), 3)
        graph = make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*tensors)
        _, others = case(torch.Generator().manual_seed(1), 7)
        for got, wanted in zip(graph(*others), call(*others), strict=True):
            assert torch.equal(got, wanted)
