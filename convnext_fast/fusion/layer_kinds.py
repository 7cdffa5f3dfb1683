"""What prevents fusing a module, or the layers in it."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..models.layer_changes import dotted, has_hooks, is_plain, kind_of
from ..models.plan import Path, follow, is_setting

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Unfusable(Exception):
    """Why a block or a patch layer is left alone."""


def others_of(module: nn.Module, paths: Iterable[Path]) -> tuple[Any, ...]:
    """The attributes that `settings_of` leaves out, of ``module`` and of its layers at ``paths``.

    Plain values, and lists of them, are compared by value, others by identity. Those of PyTorch's layers do not matter.
    """
    found = []
    for layer in (module, *(follow(module, path) for path in paths)):
        if type(layer).__module__.startswith("torch."):
            continue
        for name, value in vars(layer).items():
            if name in _OF_EVERY_MODULE or (not name.startswith("_") and is_setting(value)):
                continue
            plain = tuple(value) if isinstance(value, list) else value
            found.append((name, plain if is_setting(plain) else id(value)))
    return tuple(found)


def check_forward(block: nn.Module) -> None:
    """Check that there is one forward, which takes the activations, and keywords only if it ignores them."""
    if "forward" in vars(block):
        raise Unfusable("its forward was replaced")
    owners = [kind for kind in type(block).__mro__ if kind is not nn.Module and "forward" in vars(kind)]
    if not owners:
        raise Unfusable("it has no forward")
    if len(owners) > 1:
        raise Unfusable(f"{owners[0].__name__} overrides the forward of {owners[1].__name__}")
    forward = owners[0].forward
    parameters = [p for p in inspect.signature(forward).parameters.values() if not _is_ignored(p, forward)]
    if len(parameters) != 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise Unfusable("its forward takes more than the activations")


def takes_keywords(forward: Any) -> bool:
    """Whether a function takes any keyword."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def _is_ignored(parameter: inspect.Parameter, function: Any) -> bool:
    """Whether ``parameter`` collects keywords that ``function`` never reads."""
    plain = inspect.isfunction(function) and not hasattr(function, "__wrapped__")
    if not plain or parameter.kind is not inspect.Parameter.VAR_KEYWORD:
        return False
    read = [i.argval if isinstance(i.argval, tuple) else (i.argval,) for i in dis.get_instructions(function)]
    return not any(parameter.name in names or "locals" in names for names in read)


def check_untouched(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Check that ``layers`` have no hooks, parametrisations or replaced forwards, which would be bypassed."""
    for name, module in layers:
        if parametrize.is_parametrized(module):
            raise Unfusable(f"{name} is parametrised")
        if has_hooks(module):
            raise Unfusable(f"hooks on {name}, which the fused forward does not call")
        if "forward" in vars(module):
            raise Unfusable(f"the forward of {name} was replaced")


def check_norm(path: Path, norm: nn.Module, channels: int) -> None:
    """A LayerNorm over the channels."""
    # A norm without weight and bias has them as None; RMSNorm has no attribute "bias" at all.
    affine = [getattr(norm, name, "missing") for name in ("weight", "bias")]
    fits = all(value is None or (isinstance(value, Tensor) and value.shape == (channels,)) for value in affine)
    shape = getattr(norm, "normalized_shape", None)
    if not fits or shape is None or tuple(shape) != (channels,) or not isinstance(norm.eps, float):
        raise Unfusable(f"its norm {dotted(path)} is {kind_of(norm)}, not a LayerNorm over the {channels} channels")


def check_weights(path: Path, layer: nn.Module) -> None:
    """Weights that the fused ops can read: floating, ordinary tensors."""
    for name, parameter in layer.named_parameters(recurse=False):
        if not is_plain(parameter) or parameter.dtype not in DTYPES:
            kind = f"{kind_of(parameter)} of {parameter.dtype}"
            where = f"{dotted(path)} ({kind_of(layer)})"
            raise Unfusable(f"{name} of {where} is quantised or not floating: {kind}")
