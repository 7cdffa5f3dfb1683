"""One operator for many steps, called by compiled frozen models, and on a GPU by other models without gradients.

It takes the model's own parameters. A frozen model's are folded once, and again when they change, so that a compiled
model notices changes as any other does. An operator of `torch.library.custom_op` takes 0.1 ms or more a call, because
it also prepares for gradients. These operators have no gradients, and are registered with the dispatcher directly. The
one for frozen models stays out of a compiler's CUDA graphs, which would replay weights folded at capture.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ..backends import choose
from ..backends.cpu import llvm, onednn
from ..backends.cpu import ops as cpu
from ..backends.cpu.packed_weights import kernels_for
from ..backends.steps import WEIGHTS, Kind, Step, shapes_after
from .compute import as_one_plan
from .folded_weights import Signature, flat_block, folded, is_kept, signature

_LIBRARY = torch.library.Library("convnext_fast", "FRAGMENT")
_NAME = "_convnext_fast_kept_plan"
_IN_CALLS = {
    Kind.STEM: cpu.patchify_stem_fwd,
    Kind.DOWNSAMPLE: cpu.frozen_downsample_fwd,
    Kind.BLOCK: cpu.frozen_block_fwd,
}


def _steps(
    x: Tensor,
    weights: list[Optional[Tensor]],  # noqa: UP045 - for `infer_schema`
    tokens: list[Optional[Tensor]],  # noqa: UP045
    kinds: list[int],
    eps: list[float],
    act: str,
    ends: list[int],
) -> list[Tensor]:
    """The outputs of the steps (`steps.Step`) with the indices ``ends``, which include the last.

    x: (N, H, W, C), or a stem's (N, C, H, W); weights: of all steps; tokens, kinds: of each.
    """
    if choose.select(x.device, x.dtype) == "triton":
        x = x if kinds[0] == Kind.STEM else x.contiguous()
        if all(token is None for token in tokens):
            given = weights, kinds, eps, ends
            return list(as_one_plan(_live)(x, act, *map(tuple, given)))
        plan = _frozen_plan(weights, tokens, kinds, eps, act)
        return list(choose.module("triton").steps(x, plan, tuple(ends), x.dtype))
    steps = _cut(weights, tokens, kinds, eps, act)
    shapes, ready = shapes_after(steps, x.shape), list(map(folded, steps))
    if x.dtype == torch.float32 and onednn.supports(x):
        kernels = kernels_for(ready, [step.act for step in steps])
        if kernels is not None:
            return llvm.run(kernels, eps, shapes, x.contiguous(), ends)
    results = []
    for i, (step, own) in enumerate(zip(steps, ready, strict=True)):
        options = {Kind.STEM: (step.eps, x.dtype), Kind.BLOCK: (step.eps, act)}.get(step.kind, (step.eps,))
        x = _IN_CALLS[step.kind](x.contiguous(), own, *options, x.dtype)
        if i in ends:
            results.append(x)
    return results


def _live(x, act, weights, kinds, eps, ends) -> tuple[Tensor, ...]:
    steps = _cut(weights, [None] * len(kinds), kinds, eps, act)
    return choose.module("triton").steps(x, _plan(steps), ends, x.dtype)


class _Kept(NamedTuple):
    weights: list[Tensor | None]
    options: tuple
    signature: Signature
    plan: tuple


def _frozen_plan(
    weights: list[Tensor | None], tokens: list[Tensor | None], kinds: list[int], eps: list[float], act: str
) -> tuple:
    """What the Triton kernels take. It is kept with a token: checking each step takes longer than the launches."""
    options = kinds, eps, act
    now, token = signature(w for w in weights if w is not None), next(t for t in tokens if t is not None)
    kept = getattr(token, _NAME, None)
    if kept is not None and kept.signature == now and kept.options == options and _are_same(kept.weights, weights):
        return kept.plan
    steps = _cut(weights, tokens, kinds, eps, act)
    plan = _plan(steps)
    if now is not None and all(is_kept(step, own) for step, (own, *_) in zip(steps, plan, strict=True)):
        setattr(token, _NAME, _Kept(weights, options, now, plan))
    return plan


def _are_same(some: list[Tensor | None], others: list[Tensor | None]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _plan(steps: list[Step]) -> tuple:
    return tuple([(_weights(step), step.eps, step.act) for step in steps])


def _weights(step: Step) -> Any:
    if step.token is not None or step.kind == Kind.STEM:
        return folded(step)
    return flat_block(step.weights) if step.kind == Kind.BLOCK else step.weights


def _cut(
    weights: Sequence[Tensor | None],
    tokens: Sequence[Tensor | None],
    kinds: Sequence[int],
    eps: Sequence[float],
    act: str,
) -> list[Step]:
    rest, steps = iter(weights), []
    for token, number, e in zip(tokens, kinds, eps, strict=True):
        kind = Kind(number)
        group = WEIGHTS[kind]
        own = group._make(itertools.islice(rest, len(group._fields)))
        steps.append(Step(kind, own, e, act if kind == Kind.BLOCK else "", token))
    return steps


def _register(name: str, *tags: torch.Tag) -> Any:
    _LIBRARY.define(name + torch.library.infer_schema(_steps, mutates_args=()), tags=tags)
    for key in ("CPU", "CUDA", "XPU"):
        _LIBRARY.impl(name, _steps, key)
    torch.library.register_fake(f"convnext_fast::{name}", _shapes, lib=_LIBRARY)
    return getattr(torch.ops.convnext_fast, name)


def _shapes(
    x: Tensor,
    weights: list[Tensor | None],
    tokens: list[Tensor | None],
    kinds: list[int],
    eps: list[float],
    act: str,
    ends: list[int],
) -> list[Tensor]:
    shapes = shapes_after(_cut(weights, tokens, kinds, eps, act), x.shape)
    return [x.new_empty(shapes[end]) for end in ends]


frozen_steps = _register("frozen_steps", torch.Tag.cudagraph_unsafe)
"""`_steps`, as an operator."""
live_steps = _register("live_steps")
"""The same for the Triton kernels on the live weights, without tokens."""
