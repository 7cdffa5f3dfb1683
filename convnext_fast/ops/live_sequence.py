"""Parts of a model that is not frozen, one after another on a GPU, with nothing but their kernels in between.

Without gradients they are one plan, on the live weights. With gradients, drop path or autocast, a stem and a
downsampling layer are a call of their op each, and several blocks one of `block_group`. Arguments are checked where a
weight or the input is unlike those before.
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
    """Steps that run one after another on weights as they are. Only the first may be a stem."""

    def __init__(self, steps: Sequence[Step]):
        self._steps = list(steps)
        self._weights = tuple(w for w in chain.from_iterable(step.weights for step in steps) if w is not None)
        self._seen: Hashable = None  # what is known of the weights
        self._one_dtype: torch.dtype | None = None  # of all weights
        self._layer_scales: set[torch.dtype] = set()
        self._checked: set[tuple] = set()  # kinds of inputs that were checked with them
        self._groups: tuple[list[int], list[list[Step]]] = ([], [])  # of the ends that were asked for last

    def __call__(self, x: Tensor, ends: Sequence[int]) -> list[Tensor] | None:
        """x (N, C, H, W) that the Triton kernels take: what comes out of the steps ``ends``, (N, C', H', W') each.

        None where the modules have to be called: a tensor is a negative view, a mode observes what is done to x, or a
        layer scale is wider than the residual stream may become.
        ends: in ascending order, the last step's too.

        Raises:
            TypeError, ValueError: as the ops do.
        """
        if not call.is_plain(x) or x.is_neg() or any(map(Tensor.is_neg, self._weights)):
            return None
        seen, dtype = choose.module("triton").description(self._weights), call.compute_dtype(x)
        if seen is None or seen != self._seen:
            dtypes = {w.dtype for w in self._weights}
            self._one_dtype = dtypes.pop() if len(dtypes) == 1 else None
            self._layer_scales = {step.weights.gamma.dtype for step in self._steps if _has_layer_scale(step)}
            self._checked = set()
            self._seen = seen  # last: then other threads may rely on the rest
        streams = {torch.promote_types(x.dtype, t) for t in self._layer_scales}
        if torch.float64 in streams or (not call.autocasts(x) and streams - {x.dtype}):
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
        results = []
        for group in self._groups_to(ends):
            x = _run_group(group, x, dtype)
            if group[-1] is self._steps[ends[len(results)]]:
                results.append(as_nchw(x))
                x = results[-1].permute(0, 2, 3, 1)  # gradients pass through what is returned
        return results

    def _groups_to(self, ends: Sequence[int]) -> list[list[Step]]:
        """The steps, several blocks in a group, other steps alone; each of ``ends`` ends a group."""
        known, groups = self._groups  # read once: other threads may ask for other ends
        if known != ends:
            groups = []
            joins = False
            for i, step in enumerate(self._steps):
                block = step.kind == Kind.BLOCK
                if joins and block and len(groups[-1]) < block_group.MOST:
                    groups[-1].append(step)
                else:
                    groups.append([step])
                joins = block and i not in ends
            self._groups = list(ends), groups
        return groups

    def _is_one_plan(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether no gradient is wanted, no sample dropped, and everything has one dtype."""
        if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in self._weights)):
            return False
        if self._steps[0].kind == Kind.STEM and call.autocasts(x):  # its result is float32
            return False
        return x.dtype == dtype == self._one_dtype and all(
            step.draw is None or not step.draw.args[0].training for step in self._steps
        )


def _run_group(group: list[Step], x: Tensor, dtype: torch.dtype) -> Tensor:
    step = group[0]
    if step.kind == Kind.STEM:
        # Autocast has LayerNorm, and with it the residual stream, in float32 on every device but a CPU.
        out_dtype = torch.float32 if call.autocasts(x) and not x.is_cpu else dtype
        return call.run_plain("patchify_stem_fwd", "triton", x, step.weights, step.eps, dtype, out_dtype)
    if step.kind == Kind.DOWNSAMPLE:
        return call.run_plain("downsample_fwd", "triton", x, step.weights, step.eps, dtype)
    recomputes = torch.is_grad_enabled()
    blocks = []
    for step in group:
        scale = None if step.draw is None else step.draw(x)
        blocks.append((_flat(step), scale, step.eps, step.act, step.recompute if recomputes else 2))
    return block_group.run(x, tuple(blocks), dtype)


def _has_layer_scale(step: Step) -> bool:
    return step.kind == Kind.BLOCK and step.weights.gamma is not None


def _flat(step: Step) -> tuple[Tensor | None, ...]:
    return flat_block(step.weights) if step.kind == Kind.BLOCK else step.weights
