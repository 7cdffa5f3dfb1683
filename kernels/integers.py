"""Integer arithmetic for launchers, and cached functions of sizes: both cost the host little."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)
MOST = 4096
"""Results of one function that are remembered; sizes may change on every call."""


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own costs 5 µs per call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, which is at least 1."""
    return 1 << (n - 1).bit_length()


def remembered(function: Function) -> Function:
    """`functools.lru_cache` that also takes a compiler's symbolic integers: it makes them plain, which adds a guard."""
    known, symbolic = functools.lru_cache(MOST)(function), torch.SymInt

    @functools.wraps(function)
    def call(*args: object) -> object:
        if symbolic in map(type, args):
            args = tuple(int(arg) if isinstance(arg, torch.SymInt) else arg for arg in args)
        return known(*args)

    return call  # type: ignore[return-value]
