"""Confirm by running it that a module computes what its plan says: a formula of `reference` on its own parameters.

It runs as a copy on the CPU in float32 (PyTorch's depthwise convolution in float64 takes seconds), with every
tensor drawn from N(0, 1), so that nothing small (a layer scale of 1e-6) hides a difference; outside and in training,
where its stochastic depth must drop the same samples for one seed. A stage runs with two stand-ins for its blocks.
Neither the module nor the caller's random streams change.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..models.layer_changes import follow
from .find_blocks import Plan
from .find_patch_layers import PatchPlan
from .forward import run
from .layer_kinds import Unfusable

SAMPLES, HEIGHT, WIDTH = 8, 2, 3
RATE = 0.4
BOUND = 1e-4
"""Of the relative error, far above rounding. The activation was told apart from its like before, in float64."""


def probe_copy(module: nn.Module, copies: dict[int, object] | None = None) -> nn.Module:
    """A copy of ``module`` for `confirm`: no hooks, floating tensors random, float32 and on the CPU.

    Tensors are made by shape, so that none of the original's memory is read: it may be on a meta device, or sharded.
    """
    copies = {} if copies is None else copies
    if id(module) in copies:
        return copies[id(module)]  # type: ignore[return-value]
    copy = copies[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        copy.__dict__[name] = OrderedDict() if "hooks" in name else value
    for name in ("_parameters", "_buffers"):
        tensors = {}
        for key, tensor in getattr(module, name).items():
            if tensor is not None and id(tensor) not in copies:
                copies[id(tensor)] = _random_like(tensor)
            tensors[key] = None if tensor is None else copies[id(tensor)]
        copy.__dict__[name] = tensors
    children = module._modules.items()
    copy.__dict__["_modules"] = {key: None if m is None else probe_copy(m, copies) for key, m in children}
    return copy


def _random_like(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    fan_in = tensor[0].numel() if tensor.dim() > 1 and tensor.shape[0] else 1
    value = torch.randn(tensor.shape, dtype=torch.float32, device="cpu") / fan_in**0.5
    return nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value


class _StandIn(nn.Module):
    """In the place of a block: (2·x − 1)·step, which does not commute with itself for another step."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x - 1) * self.step


@torch.no_grad()
def confirm(module: nn.Module, plan: Plan | PatchPlan) -> None:
    """Run ``module`` and the plan.

    Raises:
        Unfusable: they compute different things.
    """
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        # `torch.manual_seed` would seed the accelerators' streams too.
        torch.default_generator.manual_seed(0)
        copies: dict[int, object] = {}
        if isinstance(plan, Plan):
            what, height, width = "a ConvNeXt block", HEIGHT, WIDTH
            channels, drop_path = follow(module, plan.dwconv).in_channels, plan.drop_path
        else:
            conv = follow(module, plan.conv)
            what = "a stem" if plan.stem else "a downsampling layer"
            # An odd height shows whether the last row is left out.
            height, width = 2 * conv.kernel_size[0] + 1, 2 * conv.kernel_size[1]
            channels, drop_path = conv.in_channels, None
            if plan.following is not None:
                copies[id(follow(module, plan.following))] = nn.ModuleList([_StandIn(2), _StandIn(3)])
        copy = probe_copy(module, copies)
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
            actual = run(copy, plan, x, fused=False)
            if not isinstance(expected, Tensor) or expected.shape != actual.shape:
                raise Unfusable("its forward returns something else than the activations")
            if not (actual - expected).norm() <= BOUND * expected.norm():
                mode = "in training" if training else "in evaluation"
                raise Unfusable(f"its forward computes something else than {what} {mode}")
        if isinstance(plan, PatchPlan) and plan.stem:
            with torch.autocast("cpu", torch.bfloat16):
                dtypes = [type(module).forward(copy, x).dtype, run(copy, plan, x, fused=False).dtype]
            if dtypes[0] != dtypes[1]:
                raise Unfusable("its output under autocast is {}, not {} as of torch's own LayerNorm".format(*dtypes))
