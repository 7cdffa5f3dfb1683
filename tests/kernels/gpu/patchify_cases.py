"""Shapes and checks of the stem and the downsampling layers, for the interpreter and for executed machine code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from convnext_fast.kernels.patchify.bwd import downsample_bwd, stem_bwd
from convnext_fast.kernels.patchify.fwd import downsample_fwd, fold_downsample, stem_fwd
from kernel_support import assert_as_good_as_eager, eager_products, layer_norm_reference, to_nchw

EPS = 1e-6
STEMS = [(3, 3, 21, 26, 40, 4), (1, 1, 8, 7, 17, 2), (2, 4, 21, 14, 96, 7), (0, 3, 8, 8, 16, 4)]
DOWNSAMPLES = [(2, 5, 6, 24, 48, 2), (1, 2, 7, 33, 20, 2), (3, 4, 4, 96, 136, 2), (0, 4, 4, 16, 32, 2)]


def _conv(x_nchw, weight, bias, k):
    if x_nchw.shape[0] == 0:
        return x_nchw.new_zeros(0, x_nchw.shape[2] // k, x_nchw.shape[3] // k, weight.shape[0])
    return F.conv2d(x_nchw, weight, bias, stride=k).permute(0, 2, 3, 1)


def _gradients(function, leaves: dict, dtype: torch.dtype, dout: torch.Tensor) -> tuple[torch.Tensor, list]:
    leaves = {name: t.to(dtype).detach().requires_grad_() for name, t in leaves.items()}
    out = function(**leaves)
    if out.numel() == 0:
        return out.detach(), [torch.zeros_like(leaf) for leaf in leaves.values()]
    return out.detach(), torch.autograd.grad(out, list(leaves.values()), dout.to(dtype))


def _compare(names, got, eager, want) -> None:
    for name, *values in zip(names, got, eager, want, strict=True):
        assert_as_good_as_eager(*values, name)


def check_stem(
    case: tuple[int, ...],
    dtype: torch.dtype,
    strided: bool = False,
    stream: torch.dtype | None = None,
    again: bool = False,
) -> None:
    """``stream``: the dtype of out and dout, if it is not ``dtype``; ``again``: equal gradients in a second run."""
    N, cin, H, W, C, k = case
    g = torch.Generator().manual_seed(N + H + C)
    image = torch.randn(N, cin, H, W, generator=g)
    if strided:
        image = image.to(memory_format=torch.channels_last).flip(3)[:, :, :, ::2]
    given = {
        "image": image.to(dtype),
        "weight": torch.randn(C, cin, k, k, generator=g) / (cin * k * k) ** 0.5,
        "bias": torch.randn(C, generator=g),
        "ln_weight": torch.randn(C, generator=g),
        "ln_bias": torch.randn(C, generator=g),
    }

    def reference(image, weight, bias, ln_weight, ln_bias):
        return layer_norm_reference(_conv(image, weight, bias, k), ln_weight, ln_bias, EPS)

    out = stem_fwd(*given.values(), EPS, dtype, stream or dtype)
    assert out.dtype == (stream or dtype)
    dout = torch.randn(out.shape, generator=g).to(out.dtype)
    grads = stem_bwd(dout, *given.values(), EPS, dtype, needs_image=True)
    if again:
        assert all(map(torch.equal, stem_bwd(dout, *given.values(), EPS, dtype, needs_image=True), grads))
    without, *grads_without = stem_bwd(dout, *given.values(), EPS, dtype, needs_image=False)
    assert without is None
    want_out, want = _gradients(reference, given, torch.float64, dout)
    with eager_products(dtype):
        eager_out, eager = _gradients(reference, given, dtype, dout)
    _compare(("out", *given), (out, *grads), (eager_out, *eager), (want_out, *want))
    _compare(list(given)[1:], grads_without, eager[1:], want[1:])


def check_downsample(
    case: tuple[int, ...], dtype: torch.dtype, stream: torch.dtype | None = None, again: bool = False
) -> None:
    """``stream``: the dtype of x, out and dout, if it is not ``dtype``; ``again``: as of `check_stem`."""
    N, H, W, C, C2, k = case
    g = torch.Generator().manual_seed(N + H + C)
    given = {
        "x": (torch.randn(N, H, W, C, generator=g) + 1).to(stream or dtype),
        "weight": torch.randn(C2, C, k, k, generator=g) / (C * k * k) ** 0.5,
        "bias": torch.randn(C2, generator=g),
        "ln_weight": torch.randn(C, generator=g),
        "ln_bias": torch.randn(C, generator=g),
    }

    def reference(x, weight, bias, ln_weight, ln_bias):
        return _conv(to_nchw(layer_norm_reference(x, ln_weight, ln_bias, EPS)), weight, bias, k)

    affine = given["ln_weight"], given["ln_bias"]
    wg, bg = fold_downsample(given["weight"], given["bias"], *affine, dtype)
    out = downsample_fwd(given["x"], wg, bg, EPS, stream or dtype)
    dout = torch.randn(out.shape, generator=g).to(out.dtype)
    grads = downsample_bwd(dout, *given.values(), EPS, dtype)
    if again:
        assert all(map(torch.equal, downsample_bwd(dout, *given.values(), EPS, dtype), grads))
    assert grads[0].dtype == given["x"].dtype
    want_out, want = _gradients(reference, given, torch.float64, dout)
    with eager_products(dtype):
        eager_out, eager = _gradients(reference, given, dtype, dout)
    _compare(("out", *given), (out, *grads), (eager_out, *eager), (want_out, *want))
