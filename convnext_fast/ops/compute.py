"""A fused op computed by the function of a backend, outside autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..backends import choose


def compute(name: str, backend: choose.Name, arguments: Sequence[Any]) -> Any:
    """The results of the op, as `interface.Backend` says. Autocast is off inside: backends cast by themselves."""
    function, kind = getattr(choose.module(backend), name), arguments[0].device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return function(*arguments)
    return function(*arguments)


@functools.cache
def as_one_plan(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with all its launches as one plan; it may only call functions of the backend "triton".

    Its arguments have to be of the kinds that kernels/replaying.py takes.
    """
    return choose.module("triton").composed(function)
