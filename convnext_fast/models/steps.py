"""What modules do, as steps that can be taken one after another without a call of any module (see `chain`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from .layer_changes import has_hooks

Kind = TypeVar("Kind", bound=type[nn.Module])


STEM, DOWNSAMPLE, BLOCK = 4, 2, 6
"""How many weights a step of each kind has, by which it is known."""


class Step(NamedTuple):
    """A stem, a frozen downsampling layer or a frozen block.

    weights: what `ops.patchify_stem`, `ops.frozen_downsample` or `ops.frozen_block` takes after the activations. act: a
    block's.
    """

    weights: tuple[Tensor | None, ...]
    eps: float
    act: str = ""


def shapes_after(steps: Iterable[tuple[Tensor | None, ...]], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """(N, H, W, C) after each step, of which the weights are given; ``shape``: before, a stem's is (N, C, H, W)."""
    shapes = []
    for weights in steps:
        if len(weights) != BLOCK:
            shape = patched(shape, weights[0].shape, stem=len(weights) == STEM)
        shapes.append(tuple(shape))
    return shapes


def patched(shape: Sequence[int], size: Sequence[int], stem: bool) -> tuple[int, int, int, int]:
    """(N, H, W, C) after a convolution of patches by a weight of ``size`` (C', C, kh, kw)."""
    height, width = shape[2:] if stem else shape[1:3]
    return shape[0], height // size[2], width // size[3], size[0]


_CALL = nn.Module.__call__
_FORWARDS = [nn.Sequential.forward, nn.Identity.forward]


def stepwise(kind: Kind) -> Kind:
    """Class decorator: the forward of ``kind`` does nothing but its ``steps()``, a list, or None where it does more.

    Without such a method, nothing but call the modules that it holds, one after another.
    """
    _FORWARDS.append(kind.forward)
    return kind


def steps_of(module: nn.Module | None) -> list[Step] | None:
    """What a call of ``module`` does; None where that is more than steps."""
    if module is None or not is_untouched(module):
        return None
    steps: Any = getattr(module, "steps", None)
    return joined(map(steps_of, module._modules.values())) if steps is None else steps()


def joined(parts: Iterable[list[Step] | None]) -> list[Step] | None:
    """All steps of ``parts``; None where one is None."""
    steps: list[Step] = []
    for part in parts:
        if part is None:
            return None
        steps += part
    return steps


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs the forward of its kind, one of those known here, and nothing else."""
    plain = type(module).forward in _FORWARDS and type(module).__call__ is _CALL
    return plain and "forward" not in module.__dict__ and not has_hooks(module) and module._compiled_call_impl is None
