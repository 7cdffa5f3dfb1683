"""What frozen parts of a model compute with: folded copies of their weights, made once and kept until these change.

A change is noticed by the identity, the version and the address of each weight. PyTorch counts a version up wherever
autograd could miss a change in place, but not for fused optimizers and for writes into ``weight.data``: `_count_writes`
has it count these too. Some ways to write leave no trace: into the memory of a NumPy array or a storage that a weight
shares, by a kernel of one's own, by collectives of `torch.distributed`, and into a ``weight.data`` that was read before
the weight was folded. Weights that are no parameters (`torch.func.functional_call`) or were made under
`torch.inference_mode` are folded anew on every call.
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
"""An attribute of the parameters that something was folded of."""
_DATA = torch.Tensor.data
_version = operator.attrgetter("_version")


def signature(weights: Iterable[Tensor]) -> Signature:
    """What tells these weights from themselves after a change: versions and addresses; None where they have none."""
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
    """A tensor to keep folded weights with, for as long as it lives. A compiler takes it for an input of its graph."""
    return torch.empty(0, device="cpu")


def folded(step: Step) -> Folded:
    """The weights of `ops.frozen_block` or `ops.frozen_downsample`; of a stem its own, which are never kept."""
    if step.kind == Kind.STEM:
        return step.weights
    now = signature(weight for weight in step.weights if weight is not None)
    kept = getattr(step.token, _NAME, None)
    if kept is not None and kept.signature == now and all(map(operator.is_, kept.weights, step.weights)):
        return kept.folded
    made = _fold(step)
    # Not of a mode that is on for the moment.
    if now is not None and step.token is not None and type(made[0]) is Tensor and watch_data(step.weights):
        setattr(step.token, _NAME, _Kept(tuple(step.weights), now, made))
    return made


def is_kept(step: Step, made: Folded) -> bool:
    """Whether ``made``, which `folded` gave for the step, is what it will give until a weight changes."""
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
    """Those of a `steps.Step` as `ops.convnext_block` takes them."""
    *_, gamma, grn_weight, grn_bias = weights
    if weights.w1.dim() == 2 and all(t is None or t.dim() == 1 for t in (gamma, grn_weight, grn_bias)):
        return weights
    w1, w2 = weights.w1.flatten(1), weights.w2.flatten(1)
    gamma, grn_weight, grn_bias = (None if t is None else t.reshape(-1) for t in (gamma, grn_weight, grn_bias))
    return weights._replace(w1=w1, w2=w2, gamma=gamma, grn_weight=grn_weight, grn_bias=grn_bias)


_HOOKS: list[Any] = []
_LOCK = threading.Lock()


def _count_writes() -> None:
    """Have PyTorch count the versions of weights where its fused optimizers or their ``data`` change them."""
    with _LOCK:
        if not _HOOKS:
            _HOOKS.append(register_optimizer_step_post_hook(_count_up))
            nn.Parameter.data = property(_data, _DATA.__set__)


def _count_up(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


def watch_data(weights: Iterable[Tensor | None]) -> bool:
    """Have writes into the ``data`` of these weights counted; whether that can be, for it takes parameters."""
    _count_writes()
    weights = [weight for weight in weights if weight is not None]
    for weight in weights:
        setattr(weight, _FOLDED, True)
    return all(isinstance(weight, nn.Parameter) for weight in weights)


def _data(parameter: nn.Parameter) -> Tensor:
    """``parameter.data``; of a folded one, the same memory with the parameter's own count of versions."""
    folded = not parameter.requires_grad and _FOLDED in vars(parameter)
    return parameter.detach() if folded else _DATA.__get__(parameter)
