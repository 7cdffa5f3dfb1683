"""Each fused op alone: its inputs, its fused and its plain form, and the results to compare."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.environment import DTYPES, cache_bytes
from bench.timing import Contender, Job, Reference
from bench.work import Work, op_work
from convnext_fast import ops
from convnext_fast.backends import reference
from convnext_fast.config import VARIANTS
from convnext_fast.measuring import Call

EPS = 1e-6
CONTENDERS = ("eager", "eager channels_last", "compile", "fused")
STEM_WIDTH = 96


def _block(fused: bool, *t: Tensor) -> Tensor:
    if fused:
        return ops.convnext_block(*t, eps=EPS)
    return reference.convnext_block(*t, None, EPS, "gelu")


def _v2_block(fused: bool, *t: Tensor) -> Tensor:
    if fused:
        return ops.convnext_v2_block(*t, eps=EPS)
    *first, grn_weight, grn_bias, w2, b2 = t
    return reference.convnext_block(*first, w2, b2, None, None, EPS, "gelu", grn_weight, grn_bias)


def _dwconv_layernorm(fused: bool, *t: Tensor) -> Tensor:
    return ops.dwconv_layernorm(*t, eps=EPS) if fused else reference.dwconv_layernorm(*t, EPS)


def _pointwise_mlp(fused: bool, *t: Tensor) -> Tensor:
    return ops.pointwise_mlp(*t) if fused else reference.pointwise_mlp(*t, None, "gelu")


def _patchify_stem(fused: bool, *t: Tensor) -> Tensor:
    return ops.patchify_stem(*t, eps=EPS) if fused else reference.patchify_stem(*t, EPS)


def _downsample(fused: bool, *t: Tensor) -> Tensor:
    return ops.downsample(*t, eps=EPS) if fused else reference.downsample(*t, EPS)


# Each op, and the shapes of its inputs after x for C channels (the stem: C input channels).
OPS: dict[str, tuple[Callable[..., Tensor], Callable[[tuple[int, ...]], list[tuple[int, ...]]]]] = {
    "dwconv_layernorm": (_dwconv_layernorm, lambda s: [(s[3], 1, 7, 7), (s[3],), (s[3],), (s[3],)]),
    "pointwise_mlp": (
        _pointwise_mlp,
        lambda s: [s, (4 * s[3], s[3]), (4 * s[3],), (s[3], 4 * s[3]), (s[3],), (s[3],)],
    ),
    "convnext_block": (
        _block,
        lambda s: [
            *[(s[3], 1, 7, 7), (s[3],), (s[3],), (s[3],)],
            *[(4 * s[3], s[3]), (4 * s[3],), (s[3], 4 * s[3]), (s[3],), (s[3],)],
        ],
    ),
    "convnext_v2_block": (
        _v2_block,
        lambda s: [
            *[(s[3], 1, 7, 7), (s[3],), (s[3],), (s[3],)],
            *[(4 * s[3], s[3]), (4 * s[3],), (4 * s[3],), (4 * s[3],), (s[3], 4 * s[3]), (s[3],)],
        ],
    ),
    "patchify_stem": (_patchify_stem, lambda s: [(STEM_WIDTH, s[3], 4, 4), *[(STEM_WIDTH,)] * 3]),
    "downsample": (_downsample, lambda s: [(s[3],), (s[3],), (2 * s[3], s[3], 2, 2), (2 * s[3],)]),
}


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One op on x of ``shape`` (N, H, W, C) in a dtype; ``mode``: "forward", "backward" or "both"."""

    op: str
    shape: tuple[int, int, int, int]
    dtype: str
    mode: str

    @property
    def name(self) -> str:
        """The case as part of a row's key."""
        return f"{self.op}/{'x'.join(map(str, self.shape))}/{self.dtype}/{self.mode}"

    @property
    def work(self) -> Work:
        """FLOPs and bytes."""
        return op_work(self.op, self.shape, DTYPES[self.dtype].itemsize, self.mode)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """x and the op's other arguments: vectors from N(0, 1), matrices and convolutions from N(0, 1/fan-in)."""
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(self.shape, generator=generator)]
        for shape in OPS[self.op][1](self.shape):
            fan_in = math.prod(shape[1:]) if shape != self.shape else 1
            tensors.append(torch.randn(shape, generator=generator) / math.sqrt(fan_in))
        if self.op == "patchify_stem":
            tensors[0] = tensors[0].permute(0, 3, 1, 2)
        return [tensor.to(device, DTYPES[self.dtype]) for tensor in tensors]

    def form(self, fused: bool) -> Callable[..., Tensor]:
        """The op as a function of its inputs."""
        return functools.partial(OPS[self.op][0], fused)

    def cotangent(self, out: Tensor) -> Tensor:
        """The output's gradient, from N(0, 1)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(out.shape, generator=generator).to(out.device, out.dtype)


def stage_shapes(variant: str, batch: int, side: int = 224) -> list[tuple[int, int, int, int]]:
    """(N, H, W, C) of the blocks of each stage."""
    return [(batch, side >> 2 + i, side >> 2 + i, width) for i, width in enumerate(VARIANTS[variant][1])]


def results(case: OpCase, run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output of one run, and the gradients of all inputs unless the mode is "forward"."""
    if case.mode == "forward":
        with torch.no_grad():
            return [run(*inputs)]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, case.cotangent(out))]


def reference_of(case: OpCase, inputs: list[Tensor]) -> Reference:
    """The results in float64 on the same inputs, and bounds from eager's errors in the case's dtype."""
    expected = results(case, case.form(False), [tensor.double() for tensor in inputs])
    return Reference.of(expected, results(case, case.form(False), inputs), case.dtype)


def build(name: str, case: OpCase, inputs: list[Tensor], device: torch.device) -> Job:
    """Prepare one of ``CONTENDERS``. Its calls alternate between copies of x, so that none is in a cache."""
    run = case.form(name == "fused")
    cotangent = case.cotangent(run(*inputs).detach())
    if name == "compile":
        run = torch.compile(run, dynamic=False)
    x, *rest = inputs
    x = _laid_out(x, case.op, torch.contiguous_format if name == "eager" else torch.channels_last)
    trains = case.mode != "forward"
    copies = min(64, 1 + -(-2 * cache_bytes(device) // (x.numel() * x.element_size())))
    turns = itertools.cycle([x.clone().requires_grad_(trains) for _ in range(copies)])
    parameters = [tensor.detach().requires_grad_(trains) for tensor in rest]

    def forward() -> Tensor:
        with torch.no_grad():
            return run(next(turns), *parameters)

    def backward() -> Call:
        turn = next(turns)
        out = run(turn, *parameters)
        return lambda: torch.autograd.grad(out, [turn, *parameters], cotangent)

    ready: dict[str, Callable[[], Call]] = {
        "forward": lambda: forward,
        "backward": backward,
        "both": lambda: lambda: backward()(),
    }
    repeats = 4 if case.mode == "backward" else 64
    return Job(ready[case.mode], lambda: results(case, run, [x, *rest]), parameters, trains, repeats)


def _laid_out(x: Tensor, op: str, layout: torch.memory_format) -> Tensor:
    """x, of the same shape, with the strides of a contiguous or of a channels_last (N, C, H, W) tensor."""
    if op == "patchify_stem":
        return x.contiguous(memory_format=layout)
    return x.permute(0, 3, 1, 2).contiguous(memory_format=layout).permute(0, 2, 3, 1)


def prepare(names: tuple[str, ...], case: OpCase, device: torch.device) -> dict[str, Contender]:
    """Contenders for `timing.measure`; ``names``: from ``CONTENDERS``."""
    inputs = case.inputs(device)
    reference = reference_of(case, inputs)
    return {name: Contender(functools.partial(build, name, case, inputs, device), reference) for name in names}
