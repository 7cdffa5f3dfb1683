"""Packed weights of frozen modules on a CPU in float32: made once, and kept as long as the weights live.

One image takes so little time that packing weights on every call would be noticeable.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence

from torch import Tensor

from ...kernels.weights import ConvNorm, FrozenBlock, FrozenDownsample
from . import llvm
from .llvm_grn import CompiledV2Block

Weights = tuple[Tensor | None, ...]
"""The fields of a `weights.FrozenBlock` or a `weights.FrozenDownsample`, or a stem's weights."""

_KEPT: dict[int, tuple[Weights, llvm.Kernel]] = {}
"""By the ``id`` of a weight, until it is freed: the other weights, and the kernel made for all of them."""


def _kept(weight: Tensor, others: Weights, make: Callable[[], llvm.Kernel]) -> llvm.Kernel:
    """The result of ``make`` for exactly these weights, which must never change."""
    kept = _KEPT.get(id(weight))
    if kept is not None and all(map(operator.is_, kept[0], others)):
        return kept[1]
    if kept is None:
        weakref.finalize(weight, _KEPT.pop, id(weight), None)
    _KEPT[id(weight)] = others, make()
    return _KEPT[id(weight)][1]


def prepared_block(weights: FrozenBlock, act: str) -> llvm.Kernel | None:
    """`ops.frozen_block_fwd` for these weights; None if not supported."""
    machine = llvm.machine_for(*weights.w1.shape) if act == "gelu" else None
    if machine is None:
        return None
    kind = llvm.CompiledBlock if weights.grn_weight is None else CompiledV2Block
    return _kept(weights.w1, weights._replace(w1=None), lambda: kind(weights, machine))


def prepared_downsample(weight: Tensor, bias: Tensor) -> llvm.Kernel | None:
    """`ops.frozen_downsample_fwd` for these weights; None if not supported."""
    machine = llvm.machine_for(*weight.shape[:2])
    return None if machine is None else _kept(weight, (bias,), lambda: llvm.CompiledPatches(machine, weight, bias))


def kernels_for(
    steps: Sequence[ConvNorm | FrozenDownsample | FrozenBlock], acts: Sequence[str]
) -> list[llvm.Kernel] | None:
    """The kernels of a stem and of frozen modules; None if one is not supported. ``acts``: the blocks' activations."""
    kernels = []
    for weights, act in reversed(list(zip(steps, acts, strict=True))):  # a stem, whose kernel is not kept, last
        if isinstance(weights, FrozenBlock):
            kernel = prepared_block(weights, act)
        else:
            make = prepared_downsample if isinstance(weights, FrozenDownsample) else llvm.prepare_stem
            kernel = make(*weights)
        if kernel is None:
            return None
        kernels.append(kernel)
    return kernels[::-1]
