"""Checks of single values, with messages that name the field, the value and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch

MOST_STAGES = 14
"""Each stage halves the image: after these the largest is one pixel."""
MOST_LABELS = 1 << 17


def integer(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """An integer in the range."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r:.80}: expected an integer of at least {least}")
    if value < least:
        raise ValueError(f"{name} is {_shown(value)}: expected an integer of at least {least}")
    if value > most:
        raise ValueError(f"{name} is {_shown(value)}: expected an integer of at most {most:,}")
    return int(value)


def _shown(value: Any) -> str:
    """A number in a message; Python refuses to print thousands of digits."""
    return str(value) if abs(value) < 1 << 64 else "a number of more than 19 digits"


def integers(name: str, value: Any, least: int, most: int) -> list[int] | tuple[int, ...]:
    """A sequence of integers in the range, as a list or a tuple."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {value!r:.80}: expected a list of integers of at least {least}")
    if len(value) > MOST_STAGES + 1:
        raise ValueError(f"{name} has {len(value):,} values: expected at most {MOST_STAGES + 1}")
    kind = list if isinstance(value, list) else tuple
    return kind(integer(f"{name}[{i}]", item, least, most) for i, item in enumerate(value))


def size(name: str, value: Any, most: int) -> int | list[int] | tuple[int, ...]:
    """A side in pixels, or two of them as (height, width)."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        pair = integers(name, value, 1, most)
        if len(pair) != 2:
            raise ValueError(f"{name} is {value!r}: expected an integer, or two as (height, width)")
        return pair
    return integer(name, value, 1, most)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a checked `size`."""
    return (size, size) if isinstance(size, int) else tuple(size)


def real(
    name: str, value: Any, least: float | None = None, most: float | None = None, allowed: str = "a number"
) -> float:
    """A finite number in the range, which a message calls ``allowed``."""
    if least is not None:
        allowed += f" of at least {least}" if most is None else f" in [{least}, {most}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r:.80}: expected {allowed}")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{name} is {_shown(value)}: expected {allowed}") from None
    if not math.isfinite(value) or (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"{name} is {value}: expected {allowed}")
    return value


def one_of(name: str, value: Any, allowed: Sequence[str]) -> Any:
    """One of a few names."""
    if not isinstance(value, str) or value not in allowed:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} is {value!r}: expected one of {', '.join(allowed)}")
    return value


def labels(name: str, value: Any) -> dict[int, str]:
    """Names of classes by index, in order; keys may be strings, as in JSON."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a mapping from class index to name")
    if len(value) > MOST_LABELS:
        raise ValueError(f"{name} names {len(value):,} classes: expected at most {MOST_LABELS:,}")
    strange = next((item for item in value.values() if not isinstance(item, (str, int, float))), None)
    if strange is not None:
        raise TypeError(f"{name} holds a {type(strange).__name__}: expected names of classes")
    try:
        return dict(sorted((int(key), item) for key, item in value.items()))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} has the keys {list(value)[:5]}…: expected class indices") from None


def mapping(name: str, value: Any) -> dict[Any, Any]:
    """A dictionary from names of classes to indices."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a mapping from name to class index")
    return dict(value.items())


def floating(name: str, value: Any) -> torch.dtype | None:
    """A floating dtype, given as one or by its name; None and "auto" are None."""
    found = None if value == "auto" else getattr(torch, value, value) if isinstance(value, str) else value
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise TypeError(f"{name} is {value!r}: expected a floating torch.dtype, or None to keep the checkpoint's")
    return found


def device(name: str, value: Any) -> torch.device:
    """A device, given as one, by its name or by its index."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"{name} is {value!r:.80}: expected one of PyTorch's devices") from None


def states(name: str, value: Any) -> Any:
    """Which hidden states are returned: True, False (also given as None), or indices."""
    if value is None or isinstance(value, int):
        return False if value is None else value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {value!r:.80}: expected True, False or indices of states")
    return integers(name, value, -MOST_STAGES - 1, MOST_STAGES)
