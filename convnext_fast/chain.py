"""Frozen modules on a CPU one after another, with nothing but their kernels in between.

While a kernel runs, its data push Python's out of the caches: what a block does around its kernel takes some 0.2 ms
then, and the same is true of a downsampling layer. Together that is a seventh of the time of ConvNeXt-T on one image.
So all that is asked of the modules is asked before the first kernel starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.modules import module as globally

from . import backend, compiled, onednn, ops
from .checks import check_frozen_block, check_frozen_downsample, check_stem
from .memory import as_nchw
from .prepared import kernel_for
from .steps import Step, shapes_after

_CHECKS = {4: check_stem, 2: check_frozen_downsample, 6: check_frozen_block}


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
    if torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in chain.from_iterable(weights)):
        return None
    eps = [step.eps for step in steps]
    ends = [count - 1 for count in accumulate(map(len, parts))]
    values = x if len(weights[0]) == 4 else x.permute(0, 2, 3, 1)
    shapes = _checked(weights, values)
    if torch.compiler.is_compiling():
        acts = {step.act for step in steps if step.act}
        if len(acts) > 1:
            return None
        from .frozen_ops import frozen_steps

        flat, counts = list(chain.from_iterable(weights)), list(map(len, weights))
        return [y.permute(0, 3, 1, 2) for y in frozen_steps(values, flat, counts, eps, "".join(acts), ends)]
    befores = [values.shape, *shapes]
    kernels = [kernel_for(step.weights, step.act, before) for step, before in zip(steps, befores, strict=False)]
    if not all(isinstance(kernel, compiled.Kernel) for kernel in kernels):
        return None
    return list(map(as_nchw, compiled.run(kernels, eps, shapes, values.contiguous(), ends)))


def _checked(steps: list[tuple[Tensor | None, ...]], x: Tensor) -> list[tuple[int, ...]]:
    """`steps.shapes_after`; raises what the ops raise for steps that do not fit x."""
    wants_values, shapes = not torch.compiler.is_compiling(), shapes_after(steps, x.shape)
    for weights, shape in zip(steps, shapes, strict=True):
        _CHECKS[len(weights)](wants_values, x, *weights)
        if shape != x.shape:
            x = x.new_empty(1).expand(shape)
    return shapes


def _serves(x: Tensor) -> bool:
    """Whether the path for CPUs takes x, which wants no gradient, and nothing but a compiler looks on."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if torch.compiler.is_compiling():
        looked_at = backend.autocasts(x)
    else:
        looked_at = not ops.is_unseen(x) or not onednn.serves(x)
    return not looked_at and backend.select(x.device, x.dtype) == "aten"


def _hooks_everywhere() -> bool:
    return bool(
        globally._global_forward_hooks
        or globally._global_forward_pre_hooks
        or globally._global_backward_hooks
        or globally._global_backward_pre_hooks
    )
