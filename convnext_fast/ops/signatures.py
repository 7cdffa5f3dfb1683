"""The arguments of each fused op: in groups, as the backends take them, and flat, as PyTorch's dispatcher does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from torch import Tensor

from ..backends.interface import Backend


class Signature:
    """The signature of one function of `interface.Backend`.

    Attributes:
        name: of the op.
        backward: the name of its backward.
        names: of its parameters.
        flat: its parameters and result, each group (a NamedTuple of tensors) split into its fields.
    """

    def __init__(self, function: Callable):
        self.name = function.__name__
        self.backward = self.name.replace("_fwd", "_bwd")
        hints = get_type_hints(function)
        result = hints.pop("return")
        self._parts: list[tuple[str, type | None, int, int]] = []  # name, group, start and end in the flat ones
        flat: list[inspect.Parameter] = []
        for name, hint in hints.items():
            group = hint if hasattr(hint, "_fields") else None
            fields = {name: hint} if group is None else get_type_hints(group)
            self._parts.append((name, group, len(flat), len(flat) + len(fields)))
            flat += (
                inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=h) for n, h in fields.items()
            )
        self.names = tuple(hints)
        self._places = {name: place for name, *place in self._parts}
        self._count = len(flat)
        self.flat = inspect.Signature(flat, return_annotation=result)

    def group(self, flat: Sequence[Any]) -> list[Any]:
        """The arguments as a backend takes them."""
        return [flat[a] if kind is None else kind(*flat[a:b]) for _, kind, a, b in self._parts]

    def gradients(self, **grads: Any) -> tuple[Tensor | None, ...]:
        """A gradient or None for each flat argument, for autograd. ``grads``: by name; for a group a sequence."""
        found: list[Tensor | None] = [None] * self._count
        for name, grad in grads.items():
            kind, a, b = self._places[name]
            found[a:b] = (grad,) if kind is None else grad
        return tuple(found)


def flatten(arguments: Sequence[Any]) -> list[Any]:
    """The inverse of `Signature.group`."""
    flat: list[Any] = []
    for argument in arguments:
        if isinstance(argument, tuple):
            flat += argument
        else:
            flat.append(argument)
    return flat


SIGNATURES = {name: Signature(function) for name, function in vars(Backend).items() if name.endswith(("_fwd", "_bwd"))}
"""By the op's name."""
