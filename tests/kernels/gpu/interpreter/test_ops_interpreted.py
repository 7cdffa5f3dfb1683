"""The public ops through the kernels: vectors of any strides, an epsilon of zero, dtypes of results."""

import pytest
import torch
from kernel_support import assert_as_good_as_eager

from convnext_fast import ops
from convnext_fast.backends import reference

N, SIDE, C, K = 2, 5, 8, 24
BLOCK = ("dwconv_weight", "dwconv_bias", "ln_weight", "ln_bias", "w1", "b1", "w2", "b2", "gamma", "drop_scale")


def block_inputs():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    x = normal(N, SIDE, SIDE, C)
    shapes = ((C, 1, 7, 7), (C,), (C,), (C,), (K, C), (K,), (C, K), (C,), (C,), (N,))
    return x, {name: normal(*shape) / 3 for name, shape in zip(BLOCK, shapes, strict=True)}


def gradients(x, tensors, function):
    leaves = [t.detach().requires_grad_() for name, t in tensors.items() if name != "drop_scale"]
    given = dict(zip(tensors, [*leaves, tensors["drop_scale"]], strict=True))
    y = function(x, given)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def strided(t):
    """The same values with other numbers between them."""
    apart = torch.full((*t.shape, 3), 77.0)
    apart[..., 1] = t
    return apart[..., 1]


@pytest.mark.parametrize("name", BLOCK)
def test_strided_operands_of_a_block(name):
    x, tensors = block_inputs()

    def run(x, given):
        return ops.convnext_block(x, *given.values())

    expected = gradients(x, tensors, run)
    # `detach` keeps the strides.
    for got, want in zip(gradients(x, tensors | {name: strided(tensors[name])}, run), expected, strict=True):
        assert torch.equal(got, want)


def negative(t):
    """The same values, with the opposite sign in memory."""
    return torch._neg_view(-t)


def test_negative_operands_of_a_block():
    x, tensors = block_inputs()

    def run(change):
        leaves = [t.clone().requires_grad_(name != "drop_scale") for name, t in tensors.items()]
        y = ops.convnext_block(change(x), *map(change, leaves))
        return [y.detach(), *torch.autograd.grad(y, leaves[:-1], change(x.flip(0)))]

    for got, want in zip(run(negative), run(torch.clone), strict=True):
        assert torch.equal(got, want)


def test_expanded_drop_scale():
    x, tensors = block_inputs()
    tensors["drop_scale"] = torch.tensor([0.5]).expand(N)
    got = ops.convnext_block(x, *tensors.values())
    tensors["drop_scale"] = tensors["drop_scale"].clone()
    assert torch.equal(got, ops.convnext_block(x, *tensors.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_epsilon_of_zero(dtype):
    """Rows of a tile beyond the last pixel do not divide by zero."""
    x, tensors = block_inputs()

    def run(x, given):
        given = {name: t.to(dtype) for name, t in given.items()}
        return ops.convnext_block(x.to(dtype), *given.values(), eps=0.0)

    def plain(kind):
        def run(x, given):
            given = {name: t.to(kind) for name, t in given.items()}
            return reference.convnext_block(x.to(kind), *given.values(), 0.0, "gelu")

        return run

    ours, eager, exact = (gradients(x, tensors, f) for f in (run, plain(dtype), plain(torch.float64)))
    for got, allowed, want in zip(ours, eager, exact, strict=True):
        assert_as_good_as_eager(got, allowed, want, terms=N * SIDE * SIDE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_block_under_autocast(dtype):
    """Its result is as wide as γ for any x, and the gradient of x has the dtype of x."""
    x, tensors = block_inputs()
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def run(function, kind, **options):
        leaves = [x.to(kind or dtype), *(t.to(kind or torch.float32) for t in tensors.values())]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", torch.float16, enabled=kind is None):
            y = function(*leaves[:-1], leaves[-1].detach(), **options)
        return [y.detach(), *torch.autograd.grad(y, leaves[:-1], cotangent.to(y))]

    ours = run(ops.convnext_block, None)
    eager, exact = (run(reference.convnext_block, kind, eps=1e-6, act="gelu") for kind in (None, torch.float64))
    assert [ours[0].dtype, ours[1].dtype] == [torch.float32, dtype]
    for got, allowed, want in zip(ours, eager, exact, strict=True):
        assert got.dtype == allowed.dtype
        assert_as_good_as_eager(got, allowed, want, terms=N * SIDE * SIDE)


@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.float16])
def test_result_of_an_mlp_without_residual_has_the_dtype_of_eager(gamma_dtype):
    x, tensors = block_inputs()
    mlp = [tensors[name].half() for name in ("w1", "b1", "w2", "b2")]
    gamma = tensors["gamma"].to(gamma_dtype)
    y = ops.pointwise_mlp(x.half(), None, *mlp, gamma)
    assert y.dtype == reference.pointwise_mlp(x.half(), None, *mlp, gamma, None, "gelu").dtype == gamma_dtype


@pytest.mark.parametrize("name", ["convnext_block", "dwconv_layernorm", "pointwise_mlp", "patchify_stem", "downsample"])
def test_a_batch_of_cotangents(name):
    """It is refused with its name: the kernels take one cotangent at a time."""
    x, tensors = block_inputs()
    block, affine = list(tensors.values()), (tensors["ln_weight"], tensors["ln_bias"])
    arguments = {
        "convnext_block": (x, *block[:-1]),
        "dwconv_layernorm": (x, *block[:4]),
        "pointwise_mlp": (x, x.flip(0), *block[4:9]),
        "patchify_stem": (torch.randn(2, 3, 8, 9), torch.randn(C, 3, 4, 4) / 7, tensors["b2"], *affine),
        "downsample": (x, *affine, torch.randn(12, C, 2, 2) / 6, None),
    }[name]
    leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
    y = getattr(ops, name)(*leaves)
    present = [t for t in leaves if t is not None]
    with pytest.raises(NotImplementedError, match="a batch of output gradients"):
        torch.autograd.grad(y, present, torch.randn(3, *y.shape), is_grads_batched=True, retain_graph=True)
    assert all(g is not None for g in torch.autograd.grad(y, present, torch.randn_like(y)))
