"""The compiled kernel that Triton launches for a call, found again in a tenth of the time that Triton takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any

from .recorded_tensor import RecordedTensor

_MOST = 8192
_KNOWN: dict[tuple, Any] = {}
_HASHED = frozenset((int, float, bool, str, tuple, type(None)))
"""Types of constants that are cheap to hash. Others, such as layouts, are told apart by their ids."""


def compiled(kernel: Any, args: tuple, meta: dict[str, Any], where: Hashable) -> Any:
    """What Triton launches for ``kernel[...](*args, **meta)``, compiled if it is new.

    ``where``: Triton's driver and the current device.

    The key says more than a kernel is compiled for, because asking Triton would be slower: the powers of two that
    divide numbers and addresses, and the types of other arguments.
    """
    kinds = [
        value.specialised
        if type(value) is RecordedTensor
        else _specialised(value)
        if type(value) is int
        else float
        if type(value) is float
        else value
        for value in args
    ]
    values = meta.values()
    constants = [value if type(value) in _HASHED else id(value) for value in values]
    key = id(kernel), where, *kinds, *meta, *map(type, values), *constants
    found = _KNOWN.get(key)
    if found is None:
        made = kernel.run(*args, grid=(1,), warmup=True, **meta)
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        found = _KNOWN[key] = made, kernel, meta  # kept alive, so that no other object gets their ids
    return found[0]


@functools.lru_cache(_MOST)
def _specialised(value: int) -> int:
    """All properties of a number that a kernel may be compiled for, as one number, which is quickly hashed."""
    return math.gcd(value, 16) * 8 + (value == 1) * 4 + (-(2**31) <= value < 2**31) * 2 + (value < 2**63)
