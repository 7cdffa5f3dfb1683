"""FLOPs of the fused ops as PyTorch's counter sees them."""

import pytest
import torch
from convnext_fast.kernels.weights import ConvNorm, FrozenDownsample, NormConv
from torch.utils.flop_counter import FlopCounterMode

from convnext_fast import ConvNext, ConvNextConfig, ops
from convnext_fast.ops import call, flops
from convnext_fast.ops.signatures import SIGNATURES

CONFIG = ConvNextConfig(num_stages=2, hidden_sizes=[16, 40], depths=[2, 1], num_labels=5)
SIZE = (2, 3, 56, 40)  # 14×10 pixels after the stem, 7×5 after downsampling


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_counts_what_the_reference_does(frozen):
    model = ConvNext(CONFIG).eval()
    x = torch.randn(SIZE)
    with torch.no_grad():
        expected = counted(lambda: ConvNext(CONFIG, fused=False).eval()(x))
        if frozen:
            model.freeze()
        assert counted(lambda: model(x)) == expected > 0


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_backward_counts_two_products_for_each_and_the_recomputed_ones(recompute):
    c, k, pixels = 16, 64, 2 * 14 * 10
    model = ConvNext(CONFIG)
    block = model.stages[0].blocks[0]
    block.recompute = recompute
    x = torch.randn(2, c, 14, 10, requires_grad=True)
    y = block(x)
    convolution, product = 2 * pixels * c * 49, 2 * pixels * c * k
    anew = (recompute == 2) * convolution + (recompute >= 1) * product
    assert counted(lambda: y.backward(torch.randn_like(y))) == 2 * convolution + 4 * product + anew
    block.conv_dw.requires_grad_(False)
    y = block(x.detach())
    assert counted(lambda: y.backward(torch.randn_like(y))) == 4 * product + anew


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_a_compiled_model_counts_and_still_runs(backend, monkeypatch):
    model, x = ConvNext(CONFIG), torch.randn(SIZE)
    compiled = torch.compile(model, backend=backend)
    with monkeypatch.context() as patch:  # the fused ops, which a compiled model runs under the counter too
        patch.setattr(call, "sees_layers", lambda _: False)
        expected = counted(lambda: model(x).sum().backward())
    assert counted(lambda: compiled(x).sum().backward()) == expected > 0
    model.zero_grad()
    compiled(x).sum().backward()
    torch.testing.assert_close(compiled(x), model(x))


def test_every_operator_has_a_formula():
    prefix = "convnext_fast::"
    names = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    graphs_alone = {"blocks_fwd", "blocks_bwd"}  # under a counter, compiled models call their blocks one by one
    operators = {n for n in names if n.endswith(("_fwd", "_bwd"))} - graphs_alone
    assert operators == set(SIGNATURES)
    assert all(callable(getattr(flops, name)) for name in operators)


def test_patches_on_a_gpu():
    """Counted from shapes, because a CPU runs PyTorch's own convolution."""
    image, stem = torch.randn(2, 3, 22, 17), torch.randn(8, 3, 4, 4)
    x, weight = torch.randn(2, 5, 7, 8), torch.randn(12, 8, 2, 2)
    first = counted(lambda: torch.nn.functional.conv2d(image, stem, stride=4))
    second = counted(lambda: torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, stride=2))
    y, z = (2, 5, 4, 8), (2, 2, 3, 12)
    weights = ConvNorm(stem.shape, None, None, None)
    assert flops.patchify_stem_fwd(image.shape, weights, out_shape=y) == first
    assert flops.patchify_stem_bwd(y, image.shape, weights, needs_x=False) == 2 * first
    assert flops.patchify_stem_bwd(y, image.shape, weights, needs_x=True) == 3 * first
    weights = NormConv(None, None, weight.shape, None)
    assert flops.downsample_fwd(x.shape, weights, out_shape=z) == second
    assert flops.frozen_downsample_fwd(x.shape, FrozenDownsample(weight.shape, None), out_shape=z) == second
    assert flops.downsample_bwd(z, x.shape, weights) == 2 * second


def test_ops_alone():
    c, k, pixels = 8, 24, 2 * 5 * 4
    x = torch.randn(2, 5, 4, c, requires_grad=True)
    weight, affine = torch.randn(c, 1, 7, 7), (torch.randn(c), torch.randn(c))
    w1, w2 = torch.randn(k, c), torch.randn(c, k)
    convolution, product = 2 * pixels * c * 49, 2 * pixels * c * k

    def convolve():
        return ops.dwconv_layernorm(x, weight, None, *affine)

    def multiply():
        return ops.pointwise_mlp(x, x, w1, torch.randn(k), w2, torch.randn(c), recompute=1)

    assert counted(convolve) == convolution
    assert counted(lambda: convolve().sum().backward()) == 3 * convolution
    assert counted(multiply) == 2 * product
    assert counted(lambda: multiply().sum().backward()) == 7 * product
