"""Folded copies of weights, with which frozen modules compute: made once and kept until the weights change.

A change shows in the identity, the version or the address of a weight. PyTorch increments a tensor's version where
autograd could miss a change in place, but not for fused optimizers or writes into ``weight.data``: `_count_writes`
makes it count these, too. Some writes are not noticed: into a NumPy array or a storage that shares memory with a
weight, by a user's own kernel, by collectives of `torch.distributed`, and into a ``weight.data`` that was read before
the weight was folded. Weights that are not parameters (`torch.func.functional_call`) or were made under
`torch.inference_mode` are folded again on every call.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..backends.steps import Kind, Step
from ..kernels.weights import BlockWeights, ConvNorm, FrozenBlock, FrozenDownsample
from .folding import freeze_block, freeze_downsample

Folded = FrozenBlock | FrozenDownsample | ConvNorm
Signature = tuple[list[int], list[int]] | None

_NAME = "_convnext_fast_kept"
_FOLDED = "_convnext_fast_folded"
"""An attribute that marks parameters that were folded."""
_DATA = torch.Tensor.data
_version = operator.attrgetter("_version")


def signature(weights: Iterable[Tensor]) -> Signature:
    """Versions and addresses of the weights, which differ after a change; None if the weights have none."""
    weights = list(weights)
    try:
        return list(map(_version, weights)), list(map(Tensor.data_ptr, weights))
    except RuntimeError:
        return None


class _Kept(NamedTuple):
    weights: tuple[Tensor | None, ...]
    signature: Signature
    folded: Folded


@torch.inference_mode(False)
def new_token() -> Tensor:
    """A tensor that keeps folded weights for as long as it lives. A compiler treats it as an input of its graph."""
    return torch.empty(0, device="cpu")


def folded(step: Step) -> Folded:
    """The weights for `ops.frozen_block` or `ops.frozen_downsample`; for a stem its own, which are never folded."""
    if step.kind == Kind.STEM:
        return step.weights
    now = signature(weight for weight in step.weights if weight is not None)
    kept = getattr(step.token, _NAME, None)
    if kept is not None and kept.signature == now and all(map(operator.is_, kept.weights, step.weights)):
        return kept.folded
    made = _fold(step)
    # Results of a mode that is on now, such as fake tensors, are not kept.
    if now is not None and step.token is not None and type(made[0]) is Tensor and watch_data(step.weights):
        setattr(step.token, _NAME, _Kept(tuple(step.weights), now, made))
    return made


def is_kept(step: Step, made: Folded) -> bool:
    """Whether `folded`, which returned ``made`` for the step, will return the same until a weight changes."""
    kept = getattr(step.token, _NAME, None)
    return step.kind == Kind.STEM or (kept is not None and kept.folded is made)


@torch.inference_mode(False)
@torch.no_grad()
def _fold(step: Step) -> Folded:
    with torch.autocast(step.weights[0].device.type, enabled=False):
        if step.kind == Kind.DOWNSAMPLE:
            return freeze_downsample(*step.weights)
        weights, channels = flat_block(step.weights), step.weights.dwconv_weight.shape[0]
        ln_weight, ln_bias = weights.ln_weight, weights.ln_bias
        if ln_weight is None:
            ln_weight = weights.w1.new_ones(channels)
        if ln_bias is None:
            ln_bias = weights.w1.new_zeros(channels)
        return freeze_block(*weights._replace(ln_weight=ln_weight, ln_bias=ln_bias))


def flat_block(weights: BlockWeights) -> BlockWeights:
    """A block's weights, as in a `steps.Step`, in the shapes that `ops.convnext_block` takes."""
    *_, gamma, grn_weight, grn_bias = weights
    if weights.w1.dim() == 2 and all(t is None or t.dim() == 1 for t in (gamma, grn_weight, grn_bias)):
        return weights
    w1, w2 = weights.w1.flatten(1), weights.w2.flatten(1)
    gamma, grn_weight, grn_bias = (None if t is None else t.reshape(-1) for t in (gamma, grn_weight, grn_bias))
    return weights._replace(w1=w1, w2=w2, gamma=gamma, grn_weight=grn_weight, grn_bias=grn_bias)


_HOOKS: list[Any] = []
_LOCK = threading.Lock()


def _count_writes() -> None:
    """Make PyTorch increment the versions of weights that fused optimizers, or writes into ``data``, change."""
    with _LOCK:
        if not _HOOKS:
            _HOOKS.append(register_optimizer_step_post_hook(_count_up))
            nn.Parameter.data = property(_data, _DATA.__set__)


def _count_up(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


def watch_data(weights: Iterable[Tensor | None]) -> bool:
    """Make writes into the ``data`` of these weights count; return whether that works: all must be parameters."""
    _count_writes()
    weights = [weight for weight in weights if weight is not None]
    for weight in weights:
        setattr(weight, _FOLDED, True)
    return all(isinstance(weight, nn.Parameter) for weight in weights)


def _data(parameter: nn.Parameter) -> Tensor:
    """``parameter.data``; for a folded parameter, the same memory, with the parameter's own version counter."""
    folded = not parameter.requires_grad and _FOLDED in vars(parameter)
    return parameter.detach() if folded else _DATA.__get__(parameter)
