"""Frozen modules on a CPU one after another, with nothing but their kernels in between.

While a kernel runs, its data push Python's out of the caches: what a block or a downsampling layer does around its
kernel takes 0.2 to 0.5 ms then, and a kernel of ConvNeXt-T on one image 2. So all that is asked of the modules is asked
before the first kernel starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.modules import module as globally

from ..backends import choose
from ..backends.cpu import llvm, onednn
from ..backends.cpu.packed_weights import kernels_for
from ..kernels.weights import ConvNorm, FrozenBlock, FrozenDownsample
from ..models.steps import BLOCK, DOWNSAMPLE, STEM, Step, shapes_after
from . import call
from .arguments import check_frozen_block, check_frozen_downsample, check_stem
from .views import as_nchw

_KINDS = {
    STEM: (check_stem, ConvNorm),
    DOWNSAMPLE: (check_frozen_downsample, FrozenDownsample),
    BLOCK: (check_frozen_block, FrozenBlock),
}


def in_one_go(ask: Callable[[], Sequence[list[Step] | None]], x: Tensor) -> list[Tensor] | None:
    """(N, C, H, W) through parts, of which ``ask`` says the steps: what comes out of each part.

    None where modules have to be called one by one. ``ask`` is asked only where kernels may serve.
    """
    if not _serves(x) or _hooks_everywhere():
        return None
    parts = ask()
    if not all(parts):
        return None
    steps = list(chain.from_iterable(parts))
    weights = [step.weights for step in steps]
    if any(len(step) == STEM for step in weights[1:]):
        return None
    eps, acts = [step.eps for step in steps], [step.act for step in steps]
    ends = [count - 1 for count in accumulate(map(len, parts))]
    x = x if len(weights[0]) == STEM else x.permute(0, 2, 3, 1)
    shapes = _checked(steps, x)
    if torch.compiler.is_compiling():
        kinds = {act for act in acts if act}
        if len(kinds) > 1:
            return None
        from .sequence_operator import frozen_steps

        flat, counts = list(chain.from_iterable(weights)), list(map(len, weights))
        return [y.permute(0, 3, 1, 2) for y in frozen_steps(x, flat, counts, eps, "".join(kinds), ends)]
    kernels = kernels_for(weights, acts)
    return None if kernels is None else list(map(as_nchw, llvm.run(kernels, eps, shapes, x.contiguous(), ends)))


def _checked(steps: list[Step], x: Tensor) -> list[tuple[int, ...]]:
    """`steps.shapes_after`; raises what the ops raise for steps that do not fit x."""
    shapes = shapes_after([step.weights for step in steps], x.shape)
    for (weights, _, act), shape in zip(steps, shapes, strict=True):
        check, kind = _KINDS[len(weights)]
        check(x, kind(*weights), *((act,) if len(weights) == BLOCK else ()))
        if shape != x.shape:
            x = x.new_empty(1).expand(shape)
    return shapes


def _serves(x: Tensor) -> bool:
    """Whether the path for CPUs takes x, which wants no gradient, and nothing but a compiler looks on."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if call.wants_gradient(x):
        return False
    if torch.compiler.is_compiling():
        looked_at = call.autocasts(x)
    else:
        looked_at = not call.is_unseen(x) or not onednn.serves(x)
    return not looked_at and choose.select(x.device, x.dtype) in ("cpu", "aten")


def _hooks_everywhere() -> bool:
    return bool(
        globally._global_forward_hooks
        or globally._global_forward_pre_hooks
        or globally._global_backward_hooks
        or globally._global_backward_pre_hooks
    )
