"""Checks of the depthwise convolution and LayerNorm on one shape each, for all ways to execute the kernels."""

import torch
from convnext_fast.kernels.dwconv import dwconv_dgrad, dwconv_fwd, dwconv_wgrad
from convnext_fast.kernels.dwconv.tensor_core import dwconv_tensor_core
from convnext_fast.kernels.dwconv.tuning import TensorCoreConfig
from convnext_fast.kernels.layernorm import layernorm_bwd, layernorm_fwd
from convnext_fast.kernels.statistics import stats_block
from kernel_support import (
    assert_as_good_as_eager,
    dwconv_gradients,
    dwconv_reference,
    layer_norm_reference,
    merged_statistics,
)


def draw(shape: tuple[int, int, int, int], taps: int, dtype: torch.dtype, stream: torch.dtype | None = None):
    """(x in the residual stream's dtype, weight and bias float32, du in the compute dtype, dy in the stream's)."""
    torch.manual_seed(sum(shape) + taps)
    channels = shape[3]
    x = torch.randn(shape).to(stream or dtype)
    weight, bias = torch.randn(channels, 1, taps, taps) / taps, torch.randn(channels)
    du, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(stream or dtype)
    return x, weight, bias, du, dy


def check_statistics(stats: torch.Tensor, u: torch.Tensor, dtype: torch.dtype) -> None:
    """The merged statistics are those of ``u`` as stored, to float32 rounding."""
    channels = u.shape[-1]
    flat = u.double().reshape(-1, channels)
    mean, variance = merged_statistics(stats, stats_block(channels, dtype), channels)
    size = flat.abs().amax(1)
    assert ((mean - flat.mean(1)).abs() <= 1e-6 * size).all()
    assert ((variance - flat.var(1, correction=0)).abs() <= 3e-6 * size * size).all()


def check_forward(
    shape: tuple[int, int, int, int],
    taps: int,
    dtype: torch.dtype,
    stream: torch.dtype | None = None,
    with_bias: bool = True,
) -> None:
    x, weight, bias, _, _ = draw(shape, taps, dtype, stream)
    bias = bias if with_bias else None
    u, stats = dwconv_fwd(x, weight, bias, dtype)
    assert u.dtype == dtype
    reference = dwconv_reference(x.double(), weight.double(), None if bias is None else bias.double())
    eager = dwconv_reference(x.to(dtype), weight, bias)
    assert_as_good_as_eager(u, eager, reference, "u", terms=taps * taps)
    if u.numel():
        check_statistics(stats, u, dtype)


def check_data_gradient(
    shape: tuple[int, int, int, int], taps: int, dtype: torch.dtype, stream: torch.dtype | None = None
) -> None:
    _, weight, _, du, dy = draw(shape, taps, dtype, stream)
    flipped = weight.flip(2, 3)
    reference = dwconv_reference(du.double(), flipped.double(), None) + dy.double()
    for out_dtype in {dtype, dy.dtype}:
        dx = dwconv_dgrad(du, weight, dy, out_dtype)
        assert dx.dtype == out_dtype
        eager = (dwconv_reference(du, flipped, None) + dy).to(out_dtype)
        assert_as_good_as_eager(dx, eager, reference, "dx", terms=taps * taps)


def check_weight_gradient(
    shape: tuple[int, int, int, int],
    taps: int,
    dtype: torch.dtype,
    stream: torch.dtype | None = None,
    again: bool = False,
) -> None:
    """As good as eager's; ``again``: and bit-for-bit equal in a second run."""
    x, weight, _, du, _ = draw(shape, taps, dtype, stream)
    got = dwconv_wgrad(x, du, taps)
    _, *reference = dwconv_gradients(x.double(), weight.double(), du.double())
    _, *eager = dwconv_gradients(x.to(dtype), weight, du)
    terms = shape[0] * shape[1] * shape[2]
    for name, actual, by_eager, exact in zip(("dweight", "dbias"), got, eager, reference, strict=True):
        assert actual.dtype == torch.float32
        assert_as_good_as_eager(actual, by_eager, exact, name, terms=terms)
    if again:
        assert all(map(torch.equal, dwconv_wgrad(x, du, taps), got))


def check_segments(shape: tuple[int, int, int, int], taps: int, config: TensorCoreConfig) -> None:
    """A tensor-core configuration gives the values of eager and the statistics of its own output."""
    dtype = torch.float16
    x, weight, bias, _, _ = draw(shape, taps, dtype)
    u, stats = dwconv_tensor_core(
        x, weight, bias, None, dtype=dtype, out_dtype=dtype, flip=False, statistics=True, config=config
    )
    reference = dwconv_reference(x.double(), weight.double(), bias.double())
    assert_as_good_as_eager(u, dwconv_reference(x, weight, bias), reference, "u")
    check_statistics(stats, u, dtype)


def check_non_finite(dtype: torch.dtype, exact: bool) -> None:
    """One NaN and one infinity in x reach every output whose footprint holds them, and few others.

    ``exact``: no others at all; otherwise at most those in tiles of 8 outputs that read the pixel, in rows that do.
    """
    x, weight, bias, _, _ = draw((2, 12, 26, 16), 7, dtype)
    clean = x.clone()
    for n, h, w, c, value in ((0, 5, 9, 3, float("nan")), (1, 0, 25, 15, float("inf"))):
        x = clean.clone()
        x[n, h, w, c] = value
        u, _ = dwconv_fwd(x, weight, bias, dtype)
        bad = ~torch.isfinite(u)
        inside = torch.zeros_like(bad)
        inside[n, max(h - 3, 0) : h + 4, max(w - 3, 0) : w + 4, c] = True
        assert bad[inside].all()
        reach = inside.clone()
        if not exact:
            first, last = max(w - 3, 0) // 8 * 8, min(w + 3, 25) // 8 * 8 + 8
            reach[n, max(h - 3, 0) : h + 4, first:last, c] = True
        assert not bad[~reach].any()


def check_layer_norm(pixels: int, channels: int, dtype: torch.dtype, affine: bool = True) -> None:
    """Forward and backward of a standalone LayerNorm, from statistics of one block and of the convolution's blocks."""
    torch.manual_seed(channels)
    eps = 1e-6
    u = (torch.randn(pixels, channels) * 2 + 3).to(dtype)
    dn = torch.randn(pixels, channels).to(dtype)
    weight, bias = (torch.randn(channels), torch.randn(channels)) if affine else (None, None)
    exact = [None if t is None else t.double().requires_grad_() for t in (u, weight, bias)]
    eager = [None if t is None else t.to(dtype).requires_grad_() for t in (u, weight, bias)]
    wanted = layer_norm_reference(*exact, eps)
    by_eager = layer_norm_reference(*eager, eps)
    wanted.backward(dn.double())
    by_eager.backward(dn)
    for block in {channels, stats_block(channels, dtype)}:
        parts = u.double().split(block, dim=1)
        moments = [torch.stack((p.mean(1), p.var(1, correction=0) * p.shape[1]), 1) for p in parts]
        stats = torch.stack(moments).float()
        n = layernorm_fwd(u, stats, weight, bias, eps)
        assert_as_good_as_eager(n, by_eager.detach(), wanted.detach(), "n", terms=channels)
        du, dweight, dbias = layernorm_bwd(dn, u, stats, weight, eps)
        assert_as_good_as_eager(du, eager[0].grad, exact[0].grad, "du", terms=channels)
        if affine:
            assert_as_good_as_eager(dweight, eager[1].grad, exact[1].grad, "dweight", terms=pixels)
            assert_as_good_as_eager(dbias, eager[2].grad, exact[2].grad, "dbias", terms=pixels)
