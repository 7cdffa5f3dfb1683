"""Steps of a model that is not frozen, run one after another on a GPU without calls of modules in between.

Without gradients they are one plan, on the live weights. With gradients, drop path or autocast, a stem or a
downsampling layer is one call of its op, and several blocks are one call of `block_group`, in a compiler's graph too.
Arguments are checked when a weight or the input differs in kind from those before.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain

import torch
from torch import Tensor

from ..backends import choose
from ..backends.steps import Kind, Step
from . import block_group, call
from .folded_weights import flat_block
from .sequence import MOST_SHAPES, check_steps, kind_of
from .views import as_nchw


class LiveSequence:
    """Steps that run one after another on the live weights. Only the first may be a stem."""

    def __init__(self, steps: Sequence[Step]):
        self._steps = list(steps)
        self._weights = tuple(w for w in chain.from_iterable(step.weights for step in steps) if w is not None)
        self._seen: Hashable = None  # the description of the weights
        self._one_dtype: torch.dtype | None = None  # of all weights, if they share one
        self._layer_scales: set[torch.dtype] = set()
        self._checked: set[tuple] = set()  # kinds of inputs checked with these weights
        self._groups: tuple[list[int], list[list[Step]]] = ([], [])  # the last ends and their groups

    def __call__(self, x: Tensor, ends: Sequence[int]) -> list[Tensor] | None:
        """The outputs of the steps ``ends``, (N, C', H', W') each, for x (N, C, H, W) that the Triton kernels take.

        None if the modules have to be called: a tensor is a negative view, a mode observes operations on x, or a
        layer scale has a wider dtype than the residual stream may have.
        ends: indices of steps in ascending order, including the last step.

        Raises:
            TypeError, ValueError: as the ops do.
        """
        if not call.is_plain(x) or x.is_neg() or any(map(Tensor.is_neg, self._weights)):
            return None
        seen, dtype = choose.module("triton").description(self._weights), call.compute_dtype(x)
        if seen is None or seen != self._seen:
            dtypes = {w.dtype for w in self._weights}
            self._one_dtype = dtypes.pop() if len(dtypes) == 1 else None
            self._layer_scales = _layer_scales(self._steps)
            self._checked = set()
            self._seen = seen  # set last: other threads then rely on the rest
        if not _keeps_its_dtype(x, self._layer_scales):
            return None
        x = x if self._steps[0].kind == Kind.STEM else x.permute(0, 2, 3, 1).contiguous()
        kind = *kind_of(x), dtype
        if kind not in self._checked:
            check_steps(self._steps, x)
            if len(self._checked) >= MOST_SHAPES:
                self._checked.clear()
            self._checked.add(kind)
        if self._is_one_plan(x, dtype):
            steps = tuple([(_flat(step), step.eps, step.act) for step in self._steps])
            return list(map(as_nchw, choose.module("triton").steps(x, steps, tuple(ends), dtype)))
        known, groups = self._groups  # read once: other threads may replace it
        if known != ends:
            groups = _groups_to(self._steps, ends)
            self._groups = list(ends), groups
        return _run_groups(groups, x, ends, dtype)

    def _is_one_plan(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether no gradient is needed, no sample is dropped, and everything has one dtype."""
        if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in self._weights)):
            return False
        if self._steps[0].kind == Kind.STEM and call.autocasts(x):  # its result is float32
            return False
        return x.dtype == dtype == self._one_dtype and all(
            step.draw is None or not step.draw.args[0].training for step in self._steps
        )


def compiled(steps: Sequence[Step], x: Tensor, ends: Sequence[int]) -> list[Tensor] | None:
    """As `LiveSequence` in a compiler's graph, with gradients; None if the modules have to be called."""
    if not choose.is_whole(x.device) or not _keeps_its_dtype(x, _layer_scales(steps)):
        return None
    x = x if steps[0].kind == Kind.STEM else x.permute(0, 2, 3, 1).contiguous()
    check_steps(steps, x)
    return _run_groups(_groups_to(steps, ends), x, ends, call.compute_dtype(x))


def _groups_to(steps: Sequence[Step], ends: Sequence[int]) -> list[list[Step]]:
    """The steps in groups: several blocks together, other steps alone. Each of ``ends`` is the last of a group."""
    groups: list[list[Step]] = []
    joins = False
    for i, step in enumerate(steps):
        block = step.kind == Kind.BLOCK
        if joins and block and len(groups[-1]) < block_group.MOST:
            groups[-1].append(step)
        else:
            groups.append([step])
        joins = block and i not in ends
    return groups


def _run_groups(groups: list[list[Step]], x: Tensor, ends: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    results, last = [], -1
    for group in groups:
        x, last = _run_group(group, x, dtype), last + len(group)
        if last in ends:
            results.append(as_nchw(x))
            x = results[-1].permute(0, 2, 3, 1)  # so gradients pass through the returned tensor
    return results


def _run_group(group: list[Step], x: Tensor, dtype: torch.dtype) -> Tensor:
    step = group[0]
    run = call.run if torch.compiler.is_compiling() else call.run_plain
    if step.kind == Kind.STEM:
        # Autocast runs LayerNorm in float32 on every device but a CPU, so the residual stream is float32, too.
        out_dtype = torch.float32 if call.autocasts(x) and not x.is_cpu else dtype
        return run("patchify_stem_fwd", "triton", x, step.weights, step.eps, dtype, out_dtype)
    if step.kind == Kind.DOWNSAMPLE:
        return run("downsample_fwd", "triton", x, step.weights, step.eps, dtype)
    recomputes = torch.is_grad_enabled()
    blocks = []
    for step in group:
        scale = None if step.draw is None else step.draw(x)
        blocks.append((_flat(step), scale, step.eps, step.act, step.recompute if recomputes else 2))
    return block_group.run(x, tuple(blocks), dtype)


def _layer_scales(steps: Sequence[Step]) -> set[torch.dtype]:
    """The dtypes of the layer scales."""
    return {step.weights.gamma.dtype for step in steps if step.kind == Kind.BLOCK and step.weights.gamma is not None}


def _keeps_its_dtype(x: Tensor, layer_scales: set[torch.dtype]) -> bool:
    """Whether no layer scale has a wider dtype than the residual stream of x may have."""
    streams = {torch.promote_types(x.dtype, dtype) for dtype in layer_scales}
    return torch.float64 not in streams and (call.autocasts(x) or streams <= {x.dtype})


def _flat(step: Step) -> tuple[Tensor | None, ...]:
    return flat_block(step.weights) if step.kind == Kind.BLOCK else step.weights
