"""Parts of a model that is not frozen, one after another on a GPU, with nothing but their kernels in between.

Without gradients they are one plan, on the live weights. With gradients, drop path or autocast, a stem and a
downsampling layer are a call of their op each, and several blocks one of `block_group`, in a compiler's graph too.
Arguments are checked where a weight or the input is unlike those before.
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
            self._layer_scales = _layer_scales(self._steps)
            self._checked = set()
            self._seen = seen  # last: then other threads may rely on the rest
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
        known, groups = self._groups  # read once: other threads may ask for other ends
        if known != ends:
            groups = _groups_to(self._steps, ends)
            self._groups = list(ends), groups
        return _run_groups(groups, x, ends, dtype)

    def _is_one_plan(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether no gradient is wanted, no sample dropped, and everything has one dtype."""
        if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in self._weights)):
            return False
        if self._steps[0].kind == Kind.STEM and call.autocasts(x):  # its result is float32
            return False
        return x.dtype == dtype == self._one_dtype and all(
            step.draw is None or not step.draw.args[0].training for step in self._steps
        )


def compiled(steps: Sequence[Step], x: Tensor, ends: Sequence[int]) -> list[Tensor] | None:
    """As `LiveSequence` in a compiler's graph, with gradients; None where the modules have to be called."""
    if not choose.is_whole(x.device) or not _keeps_its_dtype(x, _layer_scales(steps)):
        return None
    x = x if steps[0].kind == Kind.STEM else x.permute(0, 2, 3, 1).contiguous()
    check_steps(steps, x)
    return _run_groups(_groups_to(steps, ends), x, ends, call.compute_dtype(x))


def _groups_to(steps: Sequence[Step], ends: Sequence[int]) -> list[list[Step]]:
    """The steps, several blocks in a group, other steps alone; each of ``ends`` ends a group."""
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
            x = results[-1].permute(0, 2, 3, 1)  # gradients pass through what is returned
    return results


def _run_group(group: list[Step], x: Tensor, dtype: torch.dtype) -> Tensor:
    step = group[0]
    run = call.run if torch.compiler.is_compiling() else call.run_plain
    if step.kind == Kind.STEM:
        # Autocast has LayerNorm, and with it the residual stream, in float32 on every device but a CPU.
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
    """Their dtypes."""
    return {step.weights.gamma.dtype for step in steps if step.kind == Kind.BLOCK and step.weights.gamma is not None}


def _keeps_its_dtype(x: Tensor, layer_scales: set[torch.dtype]) -> bool:
    """Whether no layer scale is wider than the residual stream of x may become."""
    streams = {torch.promote_types(x.dtype, dtype) for dtype in layer_scales}
    return torch.float64 not in streams and (call.autocasts(x) or streams <= {x.dtype})


def _flat(step: Step) -> tuple[Tensor | None, ...]:
    return flat_block(step.weights) if step.kind == Kind.BLOCK else step.weights
