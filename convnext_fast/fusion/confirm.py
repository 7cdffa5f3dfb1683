"""Confirm, by running it, that a module computes what its plan says: a formula of `reference` on its own parameters.

A copy runs on the CPU in float32 (PyTorch's depthwise convolution in float64 takes seconds). Its tensors are random, so
that no small value (a layer scale of 1e-6) hides a difference. It runs in evaluation and in training, where the same
seed must drop the same samples. A stage or a container runs with stand-ins for what it calls. Neither the module nor
the caller's random streams change.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..backends.reference import global_response_norm
from ..models.layer_changes import dotted
from ..models.plan import BlockPlan, PatchPlan, called_by, follow
from ..models.run_plan import read, run
from .layer_kinds import Unfusable
from .probe_copy import probe_copy

SAMPLES, HEIGHT, WIDTH = 8, 2, 3
RATE = 0.4
BOUND = 1e-4
"""Bound of the relative error, far above rounding. Similar activations were already distinguished in float64."""


@contextlib.contextmanager
def _trial() -> Iterator[None]:
    """Within it, a host's code runs without effects: no random numbers drawn, no warnings."""
    states = random.getstate(), np.random.get_state()
    # `torch.manual_seed` would seed the accelerators' streams too.
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _StandIn(nn.Module):
    """A stand-in for a block: (2·x − 1)·step, which does not commute for different steps."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x - 1) * self.step


@torch.no_grad()
def confirm(module: nn.Module, plan: BlockPlan | PatchPlan) -> None:
    """Run ``module`` and the plan; `Unfusable` if they compute different things."""
    with _trial():
        copies: dict[int, object] = {}
        if isinstance(plan, BlockPlan):
            what, height, width = "a ConvNeXt block", HEIGHT, WIDTH
            channels, drop_path = follow(module, plan.dwconv).in_channels, plan.drop_path
        else:
            conv = follow(module, plan.conv)
            what = "a stem" if plan.stem else "a downsampling layer"
            # An odd height shows whether the last row is dropped.
            height, width = 2 * conv.kernel_size[0] + 1, 2 * conv.kernel_size[1]
            channels, drop_path = conv.in_channels, None
            if plan.following is not None:
                copies[id(follow(module, plan.following))] = nn.ModuleList([_StandIn(2), _StandIn(3)])
        copy = probe_copy(module, copies)
        if isinstance(plan, BlockPlan) and plan.grn is not None:
            _confirm_grn(copy, plan)
        x = torch.randn(SAMPLES, channels, height, width, dtype=torch.float32, device="cpu")
        for training, rate in ((False, RATE), (True, 0.0), (True, RATE)):
            if drop_path is not None:
                setattr(follow(copy, drop_path), plan.rate, rate)
            torch.default_generator.manual_seed(1)
            try:
                expected = type(module).forward(copy.train(training), x.clone())
            except Exception as error:
                raise Unfusable(f"its forward fails on {tuple(x.shape)} float32: {error}") from error
            torch.default_generator.manual_seed(1)
            actual = run(copy, plan, read(copy, plan), x, fused=False)
            if not isinstance(expected, Tensor) or expected.shape != actual.shape:
                raise Unfusable("its forward returns something other than the activations")
            if not (actual - expected).norm() <= BOUND * expected.norm():
                mode = "in training" if training else "in evaluation"
                raise Unfusable(f"its forward computes something other than {what} {mode}")
        if isinstance(plan, PatchPlan) and plan.stem:
            with torch.autocast("cpu", torch.bfloat16):
                ours = run(copy, plan, read(copy, plan), x, fused=False)
                dtypes = [type(module).forward(copy, x).dtype, ours.dtype]
            if dtypes[0] != dtypes[1]:
                raise Unfusable("its output under autocast is {}, not {} as with PyTorch's LayerNorm".format(*dtypes))


def _confirm_grn(copy: nn.Module, plan: BlockPlan) -> None:
    """Run the global response norm on hidden units so small that its epsilon matters, in float64."""
    norm, (weight, bias) = follow(copy, plan.grn), plan.grn_names
    norm.double()
    affine = getattr(norm, weight).flatten(), getattr(norm, bias).flatten()
    h = 1e-6 * torch.randn(SAMPLES, HEIGHT, WIDTH, len(affine[0]), dtype=torch.float64, device="cpu")
    expected = global_response_norm(h, *affine)
    for order, back in (((0, 1, 2, 3), (0, 1, 2, 3)), ((0, 3, 1, 2), (0, 2, 3, 1))):
        try:
            actual = type(norm).forward(norm, h.permute(order).clone()).permute(back)
        except Exception:  # the norm takes the other layout
            continue
        if actual.shape == h.shape and (actual - expected).norm() <= 1e-9 * expected.norm():
            norm.float()
            return
    raise Unfusable(f"its {dotted(plan.grn)} computes something other than a global response norm")


@torch.no_grad()
def confirm_chain(container: nn.Module) -> None:
    """Run a container with a stand-in for each of its modules; `Unfusable` if it does more than call them in order."""
    with _trial():
        copies: dict[int, object] = {}
        x = expected = torch.randn(SAMPLES, 4, HEIGHT, WIDTH, dtype=torch.float32, device="cpu")
        for i, child in enumerate(called_by(container)):
            stand_in = copies.setdefault(id(child), _StandIn(i + 2))
            expected = stand_in(expected)
        copy = probe_copy(container, copies)
        for training in (False, True):
            try:
                actual = type(container).forward(copy.train(training), x.clone())
            except Exception as error:
                raise Unfusable(f"its forward fails on {tuple(x.shape)} float32: {error}") from error
            if not isinstance(actual, Tensor) or not torch.equal(actual, expected):
                raise Unfusable("its forward does more than call what it holds")


class _Call(NamedTuple):
    """A call of a part: its number, the input and what that held, the output, and `_surroundings`."""

    number: int
    x: Tensor
    held: Tensor
    y: Tensor
    surroundings: tuple[Any, ...]


class _Witness(nn.Module):
    """A stand-in for a part, which records its calls."""

    def __init__(self, number: int, calls: list[_Call]):
        super().__init__()
        self.number, self.calls = number, calls

    def forward(self, x: Tensor, **_: object) -> Tensor:
        y = x + 1
        self.calls.append(_Call(self.number, x, x.detach().clone(), y, _surroundings(x)))
        return y


def _surroundings(x: Tensor) -> tuple[Any, ...]:
    """What must be the same in each call: the state of random numbers, autograd's modes and its hooks for saving."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.get_rng_state().tolist(), torch.is_grad_enabled(), x.requires_grad, hooks


def calls_in_turn(module: nn.Module, parts: Sequence[nn.Module]) -> bool:
    """Whether ``module`` calls each of these parts once, in this order, each on the output of the one before.

    It runs with a stand-in for each. Between the calls it must not change an output, draw random numbers or checkpoint
    a part. Errors after the last call are ignored, because the stand-ins' outputs have other shapes.
    """
    if len(set(map(id, parts))) < len(parts):
        return False
    with _trial(), torch.enable_grad():
        for training in (False, True):
            calls: list[_Call] = []
            copies: dict[int, object] = {id(part): _Witness(i, calls) for i, part in enumerate(parts)}
            copy = probe_copy(module, copies).train(training)
            x = torch.randn(SAMPLES, 3, HEIGHT, WIDTH, device="cpu", requires_grad=True)
            values, surroundings = x.detach().clone(), _surroundings(x)
            with contextlib.suppress(Exception):
                type(module).forward(copy, x)
            if [call.number for call in calls] != list(range(len(parts))):
                return False
            for call in calls:
                if call.x is not x or call.surroundings != surroundings or not torch.equal(call.held, values):
                    return False
                x, values = call.y, values + 1
    return True
