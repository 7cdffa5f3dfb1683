"""Outputs of modules that a container calls one after another, computed as one sequence before its forward runs.

Such a container does other things, too (see `ChainPlan.parts`), so its own forward still runs. Each module returns the
output computed ahead only if its input is the very tensor that the module before returned, and PyTorch recorded no
change of that tensor since. If not, this module and all later ones compute as usual.
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
    """The outputs computed ahead in this thread.

    Attributes:
        known: by a module's ``id``: its input, the input's `_state`, and its output.
        how: the `_modes` under which they were computed.
    """

    def __init__(self) -> None:
        self.known: Known = {}
        self.how: Any = None

    def output(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The output of ``module`` for x if it was computed ahead, else None. It is given out once."""
        if id(module) not in self.known:
            return None
        given, state, y = self.known.pop(id(module))
        if given is x and state == _state(x) and self.how == _modes(x):
            return y
        self.known.clear()  # later outputs depend on y: free them and autograd's graph
        return None


def _state(x: Tensor) -> Any:
    """What PyTorch records about changes to x."""
    return x._version, x.requires_grad, x.is_leaf


def _modes(x: Tensor) -> Any:
    """Autocast's dtype for x, whether autograd records, and the hooks on saved tensors (checkpointing, offloading)."""
    dtype = torch.get_autocast_dtype(x.device.type) if call.autocasts(x) else None
    return dtype, torch.is_grad_enabled() and (torch._C._autograd._top_saved_tensors_default_hooks(False),)


AHEAD = Ahead()


@contextlib.contextmanager
def computed_ahead(module: nn.Module, x: Any) -> Iterator[None]:
    """While ``module`` runs its own forward on x, the modules of its plan already have their outputs.

    Each returns that output only if it is called with the very tensor that the module before returned.
    """
    before, AHEAD.known = (AHEAD.known, AHEAD.how), {}
    try:
        if type(x) is Tensor and not x.is_inference():  # inference tensors have no version
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
    if None in parts or any(has_hooks(follow(module, path)) for path in between):  # hooks may change a feature map
        return {}
    try:
        outputs = outputs_of(state.whole, None, parts, x)
    except (TypeError, ValueError):  # the module's own forward reports bad input
        outputs = None
    known: Known = {}
    for part, y in zip(parts, outputs or (), strict=False):
        known[id(part)] = (x, _state(x), y)
        x = y
    return known
