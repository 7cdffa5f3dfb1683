"""The cause of a NaN or infinite loss or gradient: the name of the first bad layer."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

from ..models.convnext import ConvNext
from .ema import local


def first_bad_layer(model: ConvNext, call: nn.Module, pixels: Tensor) -> tuple[int, str] | None:
    """(place in the order of execution, name and reason) of the first layer whose output is not finite, or None.

    Runs the batch again through ``call``, the model or a wrapper of it. A block counts as one layer, because it is one
    fused operator. pixels: (N, C, H, W), on the model's device.
    """
    if not torch.isfinite(pixels).all():
        return 0, "the batch itself"
    found: list[tuple[int, str]] = []
    places = itertools.count(1)

    def watch(name: str, layer: nn.Module, inputs: object, output: object) -> None:
        place = next(places)
        if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
            wrong = [key for key, parameter in layer.named_parameters() if not _finite(parameter)]
            reason = f"whose {', '.join(wrong)} is not finite" if wrong else "whose input was finite"
            found.append((place, f"{name}, {reason}"))

    handles = [layer.register_forward_hook(functools.partial(watch, name)) for name, layer in _layers(model)]
    try:
        with torch.no_grad():
            call(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def bad_gradients(model: nn.Module) -> list[str]:
    """The parameters whose gradients are not finite, in the model's order."""
    return [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]


def _layers(model: ConvNext) -> list[tuple[str, nn.Module]]:
    """The layers whose own ``forward`` also runs on the fused path."""
    blocks = set(model.blocks())
    stages = [(f"stages.{i}.downsample", stage.downsample) for i, stage in enumerate(model.stages) if i]
    inner = [(name, module) for name, module in model.named_modules() if module in blocks]
    return [("stem", model.stem), *stages, *inner, ("head.norm", model.head.norm), ("head.fc", model.head.fc)]


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(local(tensor)).all())
