"""What a compiled frozen model calls on a CPU: one operator for many steps.

An operator of `torch.library.custom_op` takes 0.1 ms and more a call, for it prepares for gradients, too. This one has
none, and is registered with the dispatcher directly.
"""

from __future__ import annotations

import itertools
from typing import Optional

import torch
from torch import Tensor

from ..backends.cpu import llvm, onednn
from ..backends.cpu import ops as cpu
from ..backends.cpu.packed_weights import kernels_for
from ..kernels.weights import ConvNorm, FrozenBlock, FrozenDownsample
from ..models.steps import BLOCK, DOWNSAMPLE, STEM, shapes_after

_LIBRARY = torch.library.Library("convnext_fast", "FRAGMENT")
_IN_CALLS = {
    STEM: (cpu.patchify_stem_fwd, ConvNorm),
    DOWNSAMPLE: (cpu.frozen_downsample_fwd, FrozenDownsample),
    BLOCK: (cpu.frozen_block_fwd, FrozenBlock),
}


def _steps(
    x: Tensor,
    weights: list[Optional[Tensor]],  # noqa: UP045 - what `infer_schema` understands
    counts: list[int],
    eps: list[float],
    act: str,
    ends: list[int],
) -> list[Tensor]:
    """What comes out of steps of the numbers ``ends``, among them the last, one after another (`steps.Step`).

    x: (N, H, W, C), or a stem's (N, C, H, W); counts: how many of ``weights`` belong to each step.
    """
    steps = _cut(weights, counts)
    shapes = shapes_after(steps, x.shape)
    if x.dtype == torch.float32 and onednn.serves(x):
        kernels = kernels_for(steps, [act] * len(steps))
        if kernels is not None:
            return llvm.run(kernels, eps, shapes, x.contiguous(), ends)
    results = []
    for i, (step, e) in enumerate(zip(steps, eps, strict=True)):
        options = (e, act) if len(step) == BLOCK else (e,)
        run, kind = _IN_CALLS[len(step)]
        x = run(x.contiguous(), kind(*step), *options, x.dtype)
        if i in ends:
            results.append(x)
    return results


def _cut(weights: list[Tensor | None], counts: list[int]) -> list[tuple[Tensor | None, ...]]:
    rest = iter(weights)
    return [tuple(itertools.islice(rest, count)) for count in counts]


_LIBRARY.define("frozen_steps_cpu" + torch.library.infer_schema(_steps, mutates_args=()))
_LIBRARY.impl("frozen_steps_cpu", _steps, "CPU")
frozen_steps = torch.ops.convnext_fast.frozen_steps_cpu
"""`_steps`, as an operator."""


@torch.library.register_fake("convnext_fast::frozen_steps_cpu", lib=_LIBRARY)
def _(
    x: Tensor, weights: list[Tensor | None], counts: list[int], eps: list[float], act: str, ends: list[int]
) -> list[Tensor]:
    shapes = shapes_after(_cut(weights, counts), x.shape)
    return [x.new_empty(shapes[end]) for end in ends]
