"""Outputs of parts that a host calls one after another, computed as one sequence before the host's own forward runs.

Such a host does other things, too (see `ChainPlan.parts`), so its forward runs as it is. Each part gives out what was
computed ahead only if it is called with the very tensor that the part before gave out, and PyTorch saw no change of
that since. If it is not, neither is any part after it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import call
from .layer_changes import changed, has_hooks
from .plan import follow
from .records import STATE
from .whole_runs import outputs_of

Known = dict[int, tuple[Tensor, Any, Tensor]]


class Ahead(threading.local):
    """What was computed ahead in this thread.

    Attributes:
        known: of a module, by its ``id``, the input, its `_state`, and the output.
        how: under which modes.
    """

    def __init__(self) -> None:
        self.known: Known = {}
        self.how: Any = None

    def output(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """What ``module`` makes of x, if that is known; from then on it is not."""
        if id(module) not in self.known:
            return None
        given, state, y = self.known.pop(id(module))
        if given is x and state == _state(x) and self.how == _modes(x):
            return y
        self.known.clear()  # what follows was computed of y: let go of it, and of autograd's graph
        return None


def _state(x: Tensor) -> Any:
    """What PyTorch knows of changes to x."""
    return x._version, x.requires_grad, x.is_leaf


def _modes(x: Tensor) -> Any:
    """Autocast for x, whether autograd records, and the hooks on what it saves (checkpointing, offloading)."""
    dtype = torch.get_autocast_dtype(x.device.type) if call.autocasts(x) else None
    return dtype, torch.is_grad_enabled() and (torch._C._autograd._top_saved_tensors_default_hooks(False),)


AHEAD = Ahead()


@contextlib.contextmanager
def computed_ahead(module: nn.Module, x: Any) -> Iterator[None]:
    """While ``module`` runs its own forward on x, the parts of its plan have their outputs already.

    Each gives its own out only if it is called with the very tensor that the part before gave out.
    """
    before, AHEAD.known = (AHEAD.known, AHEAD.how), {}
    try:
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


def _compute_ahead(module: nn.Module, x: Tensor) -> Known:
    state = module.__dict__.get(STATE)
    if state is None or not state.plan.fused or changed(module, state.plan) is not None:
        return {}
    parts = [follow(module, path) for path in state.plan.parts]
    between = {path[:i] for path in state.plan.parts for i in range(1, len(path))}
    if None in parts or any(has_hooks(follow(module, path)) for path in between):  # hooks may do anything to a map
        return {}
    try:
        outputs = outputs_of(state.whole, None, parts, x)
    except (TypeError, ValueError):  # the host has words of its own for bad input
        outputs = None
    known: Known = {}
    for part, y in zip(parts, outputs or (), strict=False):
        known[id(part)] = (x, _state(x), y)
        x = y
    return known
