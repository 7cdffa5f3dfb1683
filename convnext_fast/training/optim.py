"""The optimiser's parameter groups and the learning rate of a step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ..models.convnext import ConvNext
from .options import TrainingOptions


def layer_ids(model: ConvNext) -> dict[str, int]:
    """The number of the layer that each parameter belongs to, from 0 for the stem, by `ConvNext.group_matcher`."""
    matcher = model.group_matcher()
    places = {name: _place(name, matcher) for name, _ in model.named_parameters()}
    order = {place: i for i, place in enumerate(sorted(set(places.values())))}
    return {name: order[place] for name, place in places.items()}


def _place(name: str, matcher: dict[str, str | list]) -> tuple[float, ...]:
    """What a parameter is sorted by: the matcher's entry, the numbers in its name, the entry's suffix."""
    for ordinal, patterns in enumerate(matcher.values()):
        for pattern, suffix in [(patterns, None)] if isinstance(patterns, str) else patterns:
            found = re.match(pattern, name)
            if found:
                return (ordinal, *(float(number) for number in found.groups()), *(suffix or ()))
    return (math.inf,)


def parameter_groups(model: ConvNext, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups for AdamW: by layer and by whether weights decay, each with its ``lr_scale`` = layer_decay^(distance to
    the last layer). Frozen parameters are left out.
    """
    layers, exempt = layer_ids(model), model.no_weight_decay()
    last = max(layers.values())
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decays = layers[name] if layer_decay != 1.0 else last, name not in exempt
        scale, decay = layer_decay ** (last - layer), weight_decay if decays else 0.0
        new = {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale}
        group = groups.setdefault((layer, decays), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def moments(optimizer: torch.optim.AdamW) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by the names of `parameter_groups`: the tensors themselves, made where no step was taken yet."""
    found = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            found[name] = dict(state)
    return found


def learning_rate(step: int, steps_per_epoch: int, options: TrainingOptions) -> float:
    """Linear warm-up from 0, then half a cosine down to ``min_lr``; a pure function of the step, from 0."""
    total, warmup = options.epochs * steps_per_epoch, round(options.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return options.min_lr + (options.lr - options.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(groups: Iterable[dict], lr: float) -> None:
    """Give each group ``lr`` times its scale."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
