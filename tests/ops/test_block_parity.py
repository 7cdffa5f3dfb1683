"""`ops` on a CPU against the plain reference: outputs and every gradient, over random shapes, dtypes and options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from block_cases import activations, block_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BOUNDS, relative_error

from convnext_fast import ops
from convnext_fast.backends import reference
from convnext_fast.config import ACTIVATIONS

FLOATS = st.sampled_from([torch.float32, torch.float64])


def results(function, tensors, cotangent):
    """Output and gradients with respect to every tensor that requires one."""
    y = function()
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, cotangent.to(y))]


shapes = st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 19))


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    hidden=st.integers(1, 40),
    kernel=st.sampled_from([3, 5, 7]),
    dtype=FLOATS,
    act=st.sampled_from(ACTIVATIONS),
    recompute=st.sampled_from([0, 1, 2]),
    layout=st.sampled_from(["contiguous", "nchw", "strided"]),
    drop=st.booleans(),
    layer_scale=st.booleans(),
    dwconv_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_block(shape, hidden, kernel, dtype, act, recompute, layout, drop, layer_scale, dwconv_bias, seed):
    torch.manual_seed(seed)
    parameters = block_parameters(shape[3], hidden, kernel, dtype, layer_scale, dwconv_bias)
    x = activations(shape, dtype, layout)
    scale = torch.randint(0, 2, (shape[0],)).to(dtype) / 0.7 if drop else None
    cotangent = torch.randn(shape, dtype=dtype).permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    tensors = [x, *parameters.values()]
    fused = results(
        lambda: ops.convnext_block(x, **parameters, drop_scale=scale, act=act, recompute=recompute), tensors, cotangent
    )
    plain = results(
        lambda: reference.convnext_block(x, **parameters, drop_scale=scale, eps=1e-6, act=act), tensors, cotangent
    )
    # With one or two channels LayerNorm's gradient is a difference of equal terms: rounding is all that is left of it,
    # so it is measured against the terms, which are of the cotangent's size times the largest rstd.
    # Gradients with a factor rstd: those before the LayerNorm (x, the convolution's) and of its weight.
    size = cotangent.norm().item() if shape[3] <= 2 else 0.0
    convolution = parameters["dwconv_weight"], parameters["dwconv_bias"]
    u = F.conv2d(x.permute(0, 3, 1, 2), *convolution, padding="same", groups=shape[3])
    rstd = (u.var(1, correction=0) + 1e-6).rsqrt().amax().item() if u.numel() else 1.0
    before = range(1, 5 if dwconv_bias else 4)
    for i, (a, b) in enumerate(zip(fused, plain, strict=True)):
        assert a.dtype == b.dtype
        error = relative_error(a, b, size * (rstd if i in before else 1.0))
        assert error <= BOUNDS[dtype], f"result {i}: relative error {error:.1e}"


@settings(max_examples=25, deadline=None)
@given(shape=shapes, kernel=st.sampled_from([3, 5, 7]), dtype=FLOATS, seed=st.integers(0, 1000))
def test_dwconv_layernorm(shape, kernel, dtype, seed):
    torch.manual_seed(seed)
    n, h, w, c = shape
    c = c + 2
    p = list(block_parameters(c, 1, kernel, dtype).values())[:4]
    x = activations((n, h, w, c), dtype, "nchw")
    cotangent = torch.randn(n, h, w, c, dtype=dtype)
    fused = results(lambda: ops.dwconv_layernorm(x, *p), [x, *p], cotangent)
    plain = results(lambda: reference.dwconv_layernorm(x, *p, 1e-6), [x, *p], cotangent)
    assert max(relative_error(a, b) for a, b in zip(fused, plain, strict=True)) <= BOUNDS[dtype]


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes,
    dtype=FLOATS,
    residual=st.booleans(),
    recompute=st.sampled_from([0, 1, 2]),
    act=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 1000),
)
def test_pointwise_mlp(shape, dtype, residual, recompute, act, seed):
    torch.manual_seed(seed)
    p = list(block_parameters(shape[3], 23, 7, dtype).values())[4:]
    x = activations(shape, dtype, "strided")
    r = activations(shape, dtype, "nchw") if residual else None
    scale = torch.rand(shape[0], dtype=dtype)
    cotangent = torch.randn(shape, dtype=dtype)
    fused = results(lambda: ops.pointwise_mlp(x, r, *p, scale, act=act, recompute=recompute), [x, r, *p], cotangent)
    plain = results(lambda: reference.pointwise_mlp(x, r, *p, scale, act), [x, r, *p], cotangent)
    assert max(relative_error(a, b) for a, b in zip(fused, plain, strict=True)) <= BOUNDS[dtype]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_several_row_blocks(recompute, act):
    """Nothing saved for the backward pass is overwritten: a second backward pass gives the same bits."""
    parameters = block_parameters(5, 20, 7, torch.float64)
    x = activations((1, 47, 50, 5), torch.float64, "contiguous")
    leaves, cotangent = [x, *parameters.values()], torch.randn(x.shape, dtype=torch.float64)
    y = ops.convnext_block(x, **parameters, act=act, recompute=recompute)
    first, second = (torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for _ in range(2))
    plain = reference.convnext_block(x, **parameters, drop_scale=None, eps=1e-6, act=act)
    exact = [plain, *torch.autograd.grad(plain, leaves, cotangent)]
    with torch.no_grad():
        values = ops.convnext_block(x, **parameters, act=act)
    assert max(relative_error(a, b) for a, b in zip((y, *first), exact, strict=True)) <= BOUNDS[torch.float64]
    assert relative_error(values, plain) <= BOUNDS[torch.float64]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["pure", "autocast", "autocast of half"])
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_half_precision_is_as_good_as_eager(dtype, mode, recompute):
    """Each result's error against float64 is at most twice that of eager PyTorch's in the same mode."""
    torch.manual_seed(3)
    stored = dtype if mode == "pure" else torch.float32
    parameters = block_parameters(40, 160, 7, stored)
    x = activations((3, 11, 14, 40), dtype if mode == "autocast of half" else stored, "contiguous")
    scale = torch.tensor([1.25, 0.0, 1.25])
    cotangent = torch.randn(x.shape).to(dtype)
    tensors = [x, *parameters.values()]

    def run(function, **options):
        with torch.autocast("cpu", dtype=dtype, enabled=mode != "pure"):
            y = function(x, **parameters, drop_scale=scale, act="gelu", **options)
        return results(lambda: y, tensors, cotangent)

    fused = run(ops.convnext_block, recompute=recompute)
    eager = run(reference.convnext_block, eps=1e-6)
    exact = results(
        lambda: reference.convnext_block(x, **parameters, drop_scale=scale, eps=1e-6, act="gelu", dtype=torch.float64),
        tensors,
        cotangent,
    )
    for i, (a, e, r) in enumerate(zip(fused, eager, exact, strict=True)):
        assert a.dtype == e.dtype
        assert relative_error(a, r) <= 2 * relative_error(e, r), f"result {i}"


def test_frozen_parameters_get_no_gradient():
    parameters = block_parameters(6, 24, 7, torch.float64)
    for name in ("dwconv_weight", "dwconv_bias", "w1"):
        parameters[name].requires_grad_(False)
    x = activations((2, 5, 4, 6), torch.float64, "contiguous")
    ops.convnext_block(x, **parameters).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in parameters.values())
    x = x.detach()
    leaf = parameters["w2"]
    (alone,) = torch.autograd.grad(ops.convnext_block(x, **parameters).sum(), [leaf])
    assert relative_error(alone, leaf.grad) <= BOUNDS[torch.float64]


def bad(**changes):
    parameters = block_parameters(6, 24, 7, torch.float32)
    arguments = {"x": torch.randn(2, 5, 4, 6), **parameters}
    arguments.update({name: change(arguments.get(name)) for name, change in changes.items()})
    return arguments


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": lambda x: x[0]}, ValueError, r"x has shape \(5, 4, 6\): expected 4 dimensions"),
        ({"x": lambda x: x[:, :0]}, ValueError, "all but the first at least 1"),
        ({"x": lambda x: x.long()}, TypeError, "floating dtype"),
        ({"x": lambda x: x.numpy()}, TypeError, "x is a ndarray: expected a tensor"),
        ({"x": lambda x: x.double()}, TypeError, "float64 but dwconv_weight is torch.float32"),
        ({"dwconv_weight": lambda w: w[:5]}, ValueError, "depthwise weight has shape"),
        ({"dwconv_weight": lambda w: w[..., :4]}, ValueError, "side 3, 5 or 7"),
        ({"dwconv_bias": lambda b: b[:5]}, ValueError, "depthwise bias has shape"),
        ({"ln_weight": lambda w: w[:5]}, ValueError, r"ln_weight has shape \(5,\): expected \(6,\)"),
        ({"w1": lambda w: w[0]}, ValueError, r"w1 has shape \(6,\): expected a matrix"),
        ({"w2": lambda w: w.t()}, ValueError, r"w2 has shape \(24, 6\): expected \(6, 24\)"),
        ({"w2": lambda w: w.half()}, TypeError, "w2 is torch.float16"),
        ({"b1": lambda b: None}, TypeError, "b1 is a NoneType"),
        ({"b2": lambda b: b.to("meta")}, ValueError, "b2 is on meta"),
        ({"gamma": lambda g: g.long()}, TypeError, "gamma has dtype torch.int64"),
        ({"drop_scale": lambda s: torch.ones(3)}, ValueError, r"drop_scale has shape \(3,\): expected \(2,\)"),
        ({"act": lambda a: "mish"}, ValueError, "act is 'mish': expected one of gelu"),
        ({"recompute": lambda r: 3}, ValueError, "recompute is 3: expected 0, 1 or 2"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        ops.convnext_block(**bad(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(2, 5, 4)}, ValueError, "expected 4 dimensions"),
        ({"weight": torch.randn(8, 6)}, ValueError, r"patch weight has shape \(8, 6\): expected \(C', C, kh, kw\)"),
        (
            {"weight": torch.randn(8, 5, 2, 2)},
            ValueError,
            r"patch weight has shape \(8, 5, 2, 2\): expected \(8, 6, 2, 2\)",
        ),
        ({"weight": torch.randn(8, 6, 5, 2)}, ValueError, "at least one patch of"),
        ({"bias": torch.randn(7)}, ValueError, "patch bias has shape"),
        ({"ln_weight": torch.randn(7)}, ValueError, "ln_weight has shape"),
        ({"ln_bias": None}, TypeError, "ln_bias is a NoneType"),
        ({"weight": torch.randn(8, 6, 2, 2).double()}, TypeError, "but weight is torch.float64"),
    ],
)
def test_bad_patch_arguments_are_named(changes, error, message):
    shared = {"weight": torch.randn(8, 6, 2, 2), "bias": torch.randn(8)}
    down = {"x": torch.randn(2, 4, 4, 6), "ln_weight": torch.randn(6), "ln_bias": torch.randn(6), **shared, **changes}
    with pytest.raises(error, match=message):
        ops.downsample(**down)
    stem = {"ln_weight": torch.randn(8), "ln_bias": torch.randn(8), **shared, **changes}
    image = changes.get("x", torch.randn(2, 6, 4, 4))
    stem.pop("x", None)
    with pytest.raises(error, match=message):
        ops.patchify_stem(image, **stem)
