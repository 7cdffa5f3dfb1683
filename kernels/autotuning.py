"""Opt-in choice of launch configurations by measurement: ``CONVNEXT_FAST_AUTOTUNE=1``, read at import.

By default a configuration is a pure function of shape, dtype and target (the ``tuning_*`` files). With the variable set
the first launch of a kernel at a new shape on a GPU times a few candidates (``triton.testing.do_bench``) and keeps the
fastest, in memory and in Triton's cache directory, for each device, kernel source, dtype and shape; the number of
pixels or images is rounded up to a power of two. Nothing is timed while a CUDA graph is captured or a compiler traces,
which timing would break: an earlier choice is used there, otherwise the default. The interpreter and other CPU runs
take the default. Candidates may differ in the order of their sums, so results may differ in the last bits from machine
to machine.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources

from .environment import switch
from .launching import is_traced, launch_hook

Config = TypeVar("Config")
_FILE = "convnext_fast.autotune.json"


ENABLED = switch("CONVNEXT_FAST_AUTOTUNE")
_chosen: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Share:
    """How much a program sums over: ``times`` the default's share."""

    times: float = 1.0

    def of(self, share: int, block: int) -> int:
        """``times`` · ``share``, in whole blocks; for the default ``share`` itself, which a compiler may trace."""
        return share if self.times == 1 else max(1, round(share * self.times / block)) * block


SHARES = (Share(), Share(0.5), Share(2.0))


def fastest(
    kernel: Any,
    run: Callable[[Config], None],
    candidates: Sequence[Config],
    tensor: torch.Tensor,
    rows: int,
    shape: tuple,
) -> Config:
    """The candidate to launch ``kernel`` with; the first, which is the default, unless autotuning is on.

    ``run`` launches with a candidate, a dataclass, into outputs that may be overwritten. ``tensor`` is the
    main operand; ``rows`` and ``shape`` are what the kernel's time depends on besides its device and dtype.
    """
    if not ENABLED or len(candidates) == 1 or tensor.device.type != "cuda":
        return candidates[0]
    device = torch.cuda.get_device_properties(tensor.device).name
    key = key_of(kernel.cache_key, device, tensor.dtype, triton.next_power_of_2(rows), shape, *candidates)
    may_measure = not (is_traced(tensor) or torch.cuda.is_current_stream_capturing() or launch_hook.recording)

    def measure(candidate: Config) -> float:
        with torch.cuda.device(tensor.device):
            return triton.testing.do_bench(lambda: run(candidate), warmup=10, rep=40, return_mode="median")

    return choose(key, candidates, measure if may_measure else None)


@functools.cache
def key_of(*parts: Hashable) -> str:
    """A digest of everything that a choice depends on, Triton's version included."""
    return hashlib.sha256(repr((triton.__version__, *map(str, parts))).encode()).hexdigest()


def choose(key: str, candidates: Sequence[Config], measure: Callable[[Config], float] | None) -> Config:
    """The choice made for ``key`` in this process or an earlier one, else the one with the smallest ``measure`` (ms).

    A candidate that needs more resources than the chip has loses. Without ``measure`` and an earlier
    choice, the first candidate is returned, and not kept.
    """
    if key not in _chosen:
        found = load(key, candidates)
        if found is None:
            if measure is None:
                return candidates[0]
            times = [_time(measure, candidate) for candidate in candidates]
            found = candidates[times.index(min(times))]
            store(key, found)
        _chosen[key] = found
    return _chosen[key]


def _time(measure: Callable[[Config], float], candidate: Config) -> float:
    try:
        return measure(candidate)
    except OutOfResources:
        return float("inf")


def load(key: str, candidates: Sequence[Config]) -> Config | None:
    """The stored choice, None where there is none among ``candidates`` or its file cannot be read."""
    path = get_cache_manager(key).get_file(_FILE)
    if path is None:
        return None
    try:
        fields = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None
    return next((each for each in candidates if dataclasses.asdict(each) == fields), None)


def store(key: str, choice: Any) -> None:
    """Keep the choice in Triton's cache directory (``TRITON_CACHE_DIR``)."""
    get_cache_manager(key).put(json.dumps(dataclasses.asdict(choice)), _FILE, binary=False)
