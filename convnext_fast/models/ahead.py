"""Outputs of parts that a host calls one after another, computed as one sequence before the host's own forward runs.

Such a host does other things, too (see `ChainPlan.parts`), so its forward runs as it is. Each part gives out what was
computed ahead only if it is called with the very tensor that the part before gave out, and nothing changed that since.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import call
from .layer_changes import changed
from .plan import follow
from .records import STATE
from .whole_runs import outputs_of


class Ahead(threading.local):
    """What was computed ahead in this thread.

    Attributes:
        known: of a module, by its ``id``, the input, its version, and the output.
        how: under which modes.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[Tensor, int, Tensor]] = {}
        self.how: Any = None

    def output(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """What ``module`` makes of x, if that is known; from then on it is not."""
        known = self.known.pop(id(module), None)
        if known is None or known[0] is not x or known[1] != x._version or self.how != _modes(x):
            return None
        return known[2]


def _modes(x: Tensor) -> Any:
    """Autocast for x, whether autograd records, and the hooks on what it saves (checkpointing, offloading)."""
    dtype = torch.get_autocast_dtype(x.device.type) if call.autocasts(x) else None
    return dtype, torch.is_grad_enabled() and (torch._C._autograd._top_saved_tensors_default_hooks(False),)


AHEAD = Ahead()


@contextlib.contextmanager
def computed_ahead(module: nn.Module, given: Sequence[Any]) -> Iterator[None]:
    """While ``module`` runs its own forward on ``given``, the parts of its plan have their outputs already.

    Each gives its own out only if it is called with the very tensor that the part before gave out.
    """
    before, AHEAD.known = (AHEAD.known, AHEAD.how), {}
    try:
        x = given[0] if given else None
        if type(x) is Tensor and not x.is_inference():  # for these have no version
            AHEAD.how = _modes(x)
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():
                    AHEAD.known = _compute_ahead(module, x)
            else:
                AHEAD.known = _compute_ahead(module, x)
        yield
    finally:
        AHEAD.known, AHEAD.how = before


def _compute_ahead(module: nn.Module, x: Tensor) -> dict[int, tuple[Tensor, int, Tensor]]:
    state = module.__dict__.get(STATE)
    if state is None or not state.plan.fused or changed(module, state.plan) is not None:
        return {}
    parts = [follow(module, path) for path in state.plan.parts]
    try:
        outputs = None if None in parts else outputs_of(state.whole, None, parts, x)
    except (TypeError, ValueError):  # the host has words of its own for bad input
        outputs = None
    known = {}
    for part, y in zip(parts, outputs or (), strict=False):
        known[id(part)] = (x, x._version, y)
        x = y
    return known
