"""Records that show, in one fast pass, whether anything that a fused forward depends on has changed."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn

from .plan import settings_of

STATE = "_convnext_fast"
"""The attribute that holds a `freezing.State`, which is replaced when it changes."""

READ: dict[type, list[str]] = {
    nn.Conv2d: ["stride", "padding", "dilation", "groups", "padding_mode"],
    nn.LayerNorm: ["normalized_shape", "eps"],
    nn.Linear: [],
}
"""Attributes that the forward of PyTorch's own layers reads. For other classes all count."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_values, _get = dict.values, dict.get
_flat = chain.from_iterable


class Record:
    """Modules as they are now: their classes, attributes, parameters and children. None of them has hooks.

    Comparing with a record is fast, by identity, and may report a change where there is none: `layer_changes.changed`
    decides whether something changed, and what.

    Args:
        module: the one whose forward asks; None if that is a container of all ``others``. Its own hooks do not count:
            they run before its forward.
        others: the modules that are not called, but whose weights or behaviour count. They have no hooks.
    """

    def __init__(self, module: nn.Module | None, others: Iterable[nn.Module]):
        # A reference to ``module`` or to its ``__dict__`` would make a cycle: the module holds the record.
        self._root = None if module is None else module._modules
        self._others = list(others)
        own = dict(() if module is None else settings_of(module))
        self._own_names, self._own_values = list(own), list(own.values())
        everything = self._others if module is None else [module, *self._others]
        holders = [d for each in everything for d in (each._parameters, each._modules, each._buffers)]
        # Looked up by name on every call: some recipes remove hooks by assigning a new dictionary.
        self._hook_names = list(_HOOKS) * len(self._others)
        self._hook_owners = [vars(other) for other in self._others for _ in _HOOKS]
        self._hooks = hooks = list(map(_get, self._hook_owners, self._hook_names))
        self._empty = [*hooks, *(d for d in holders if not d)]
        self._holders = list(filter(None, holders))
        self._attributes = list(map(vars, self._others))
        self._names, self._settings = [], []
        for other in self._others:
            names = [STATE] * (STATE in vars(other)) + [name for name, _ in settings_of(other)]
            names = READ.get(type(other), names)
            self._names += names
            self._settings += [vars(other)] * len(names)
        self._kinds = list(map(type, self._others))
        self._sizes = list(map(len, self._attributes))
        self._counts = list(map(len, self._holders))
        self._held = list(_flat(map(_values, self._holders)))
        self._values = list(map(_get, self._settings, self._names))

    def holds(self, module: nn.Module | None) -> bool:
        """Whether nothing changed; ``module``: the one that asks, which may be a replica of the recorded one."""
        return (
            (module is None or module._modules is self._root)
            and (module is None or list(map(vars(module).get, self._own_names)) == self._own_values)
            and list(map(type, self._others)) == self._kinds
            and not any(self._empty)
            and all(map(operator.is_, map(_get, self._hook_owners, self._hook_names), self._hooks))
            and list(map(len, self._attributes)) == self._sizes
            and list(map(len, self._holders)) == self._counts
            and all(map(operator.is_, _flat(map(_values, self._holders)), self._held))
            and list(map(_get, self._settings, self._names)) == self._values
        )

    def sees(self, weights: Iterable[Any]) -> bool:
        """Whether all weights that are not None are among the recorded tensors."""
        seen = set(map(id, self._held))
        return all(weight is None or id(weight) in seen for weight in weights)
