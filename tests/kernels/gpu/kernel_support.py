"""What the kernel tests share: float64 references in plain torch, error bounds, poisoned allocations, the emulator.

A kernel's error against float64 may be twice that of the same formula in eager operators of the same dtype
(``assert_as_good_as_eager``). Outputs are allocated full of NaN (``poisoned``), so that elements that are never written
show.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """In this context new tensors of a float dtype are full of NaN."""

    def poison(make):
        def allocate(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return allocate

    def new_empty(like, *sizes, dtype=None, device=None):  # Dynamo traces this, but not the real one as a function
        return torch.empty(*sizes, dtype=dtype or like.dtype, device=device or like.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poison(torch.empty))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield


def errors(actual: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(root mean square error relative to the reference's, largest error relative to the reference's largest)."""
    reference = reference.double()
    difference = actual.double() - reference
    rms = reference.square().mean().sqrt().clamp_min(1e-30)
    peak = reference.abs().max().clamp_min(1e-30)
    return (difference.square().mean().sqrt() / rms).item(), (difference.abs().max() / peak).item()


def assert_as_good_as_eager(
    actual: torch.Tensor,
    eager: torch.Tensor,
    reference: torch.Tensor,
    name: str = "output",
    factor: float = 2.0,
    terms: int = 1,
) -> None:
    """``actual``'s error against the float64 ``reference`` is at most ``factor`` times ``eager``'s, in RMS and peak.

    Eager can be exact by luck on tiny inputs, so errors that no implementation can avoid are always allowed: one
    rounding of the result to ``actual``'s dtype and the random walk of a float32 sum of ``terms`` terms. Shapes must
    agree and ``actual`` must be finite.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    if reference.numel() == 0:
        return
    missing = (~torch.isfinite(actual)).sum().item()
    assert missing == 0, f"{name}: {missing} of {actual.numel()} values are not finite"
    floor = torch.finfo(actual.dtype).eps / 2
    if terms > 1:
        floor += torch.finfo(torch.float32).eps / 2 * terms**0.5
    for kind, got, allowed in zip(("rms", "peak"), errors(actual, reference), errors(eager, reference), strict=True):
        bound = factor * max(allowed, floor)
        assert got <= bound, f"{name}: {kind} error {got:.3e} exceeds {bound:.3e} (eager's own: {allowed:.3e})"


class TruncatedProducts(TorchDispatchMode):
    """Eager TF32 on the CPU: matrix products and dense convolutions, also backward, of the numbers tensor cores see.

    Triton passes float32 operands unchanged (no ``cvt.rna`` in its PTX), and the tensor cores use only ten bits of each
    mantissa. Sums stay in float32; depthwise convolutions are exact products, as ours are.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default):
            return func(truncated(args[0]), truncated(args[1]))
        if func is aten.addmm.default:
            return func(args[0], truncated(args[1]), truncated(args[2]), **(kwargs or {}))
        if func is aten.convolution.default and args[8] == 1:
            return func(truncated(args[0]), truncated(args[1]), *args[2:])
        if func is aten.convolution_backward.default and args[9] == 1:
            dy, x, weight, *rest = args
            dx, dweight, dbias = func(truncated(dy), truncated(x), truncated(weight), *rest)
            return dx, dweight, None if dbias is None else dy.sum((0, 2, 3))
        return func(*args, **(kwargs or {}))


def truncated(x: torch.Tensor) -> torch.Tensor:
    """Float32 ``x`` without the 13 bits of its mantissa that TF32 lacks; other dtypes as they are."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


def eager_products(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """In this context eager operators multiply as on a GPU in ``dtype``: with TF32 if PyTorch's switch allows it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return TruncatedProducts() if allowed else contextlib.nullcontext()


def to_nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def to_nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def dwconv_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Depthwise convolution of NHWC ``x`` with ``weight`` (C, 1, k, k), in the dtype of ``x``, NHWC out."""
    cast = None if bias is None else bias.to(x.dtype)
    k = weight.shape[-1]
    if x.numel() == 0:
        return torch.zeros_like(x)
    return to_nhwc(F.conv2d(to_nchw(x), weight.to(x.dtype), cast, padding=k // 2, groups=x.shape[3]))


def dwconv_gradients(
    x: torch.Tensor, weight: torch.Tensor, du: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx NHWC, dweight (C, 1, k, k), dbias (C,)) of ``dwconv_reference``, by autograd, in the dtype of ``du``."""
    x = x.to(du.dtype).detach().requires_grad_()
    weight = weight.to(du.dtype).detach().requires_grad_()
    bias = torch.zeros(weight.shape[0], dtype=du.dtype, requires_grad=True)
    u = dwconv_reference(x, weight, bias)
    return torch.autograd.grad(u, (x, weight, bias), du)


def merged_statistics(stats: torch.Tensor, block: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, variance), float64 of shape (P,), of partial statistics (NB, P, 2) with ``block`` channels per block."""
    counts = torch.tensor([min(block, channels - b * block) for b in range(stats.shape[0])], dtype=torch.float64)[
        :, None
    ]
    mean_b, m2_b = stats[..., 0].double(), stats[..., 1].double()
    mean = (counts * mean_b).sum(0) / channels
    return mean, (m2_b + counts * (mean_b - mean).square()).sum(0) / channels


def layer_norm_reference(
    u: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """LayerNorm over the last axis in the dtype of ``u``."""
    cast = [None if p is None else p.to(u.dtype) for p in (weight, bias)]
    return F.layer_norm(u, (u.shape[-1],), *cast, eps)
