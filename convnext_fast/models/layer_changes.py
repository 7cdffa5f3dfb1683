"""Layers that a fused forward does not call: what they were, and whether they still are that."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

Path = tuple[str, ...]


class Watched(NamedTuple):
    """A layer that the fused forward does not call, as it was when it was looked at.

    Attributes:
        path: attribute names that lead to it from the module that runs it.
        kind: its class.
        names, values: its plain attributes, such as a convolution's stride.
        children: names of the modules in it.
        biased: whether it does not say that it has no bias.
    """

    path: Path
    kind: type
    names: tuple[str, ...]
    values: tuple[Any, ...]
    children: tuple[str, ...]
    biased: bool


def watch(path: Path, layer: nn.Module, *skip: str) -> Watched:
    """``layer`` as it is now; ``skip``: settings that may change."""
    settings = settings_of(layer, *skip)
    names, values = (tuple(setting[i] for setting in settings) for i in range(2))
    return Watched(path, type(layer), names, values, tuple(layer._modules), _biased(layer))


def follow(module: nn.Module, path: Path) -> Any:
    """The layer at ``path``; None where there is none."""
    layer: Any = module
    for name in path:
        layer = None if layer is None else layer._modules.get(name)
    return layer


class Records(NamedTuple):
    """All layers that a module does not call, and the paths of those whose weights the fused ops read."""

    watched: tuple[Watched, ...] = ()
    weighted: tuple[Path, ...] = ()


_NUMBERS: dict[Records, int] = {}
_LOCK = threading.Lock()


def remember(records: Records) -> int:
    """A number that stands for these records in this process, the same for equal ones."""
    with _LOCK:
        return _NUMBERS.setdefault(records, len(_NUMBERS))


def recall(number: int) -> Records:
    """The records that a number stands for.

    A compiler takes them for constants of this number, which it guards: a guard for each of their fields would take as
    long as a kernel.
    """
    return next(itertools.islice(_NUMBERS, number, None))


recall._dynamo_marked_constant = True  # `torch.compiler.assume_constant_result`, which takes a second to import


def change(
    module: nn.Module, watched: tuple[Watched, ...], weighted: tuple[Path, ...], reads: bool = True
) -> str | None:
    """Why the layers of ``module`` must be called again, or None: hooks, other layers, settings, or kinds of weights.

    Every forward asks this: what holds is found out without a loop over the settings.

    ``weighted``: paths of the layers whose weights the fused ops read; ``reads``: unless copies of them are read.
    """
    for path, kind, names, values, children, biased in watched:
        layer = follow(module, path)
        if type(layer) is not kind:
            return f"{dotted(path)} is now {kind_of(layer)}, not {kind.__name__}"
        if has_hooks(layer):
            return f"hooks on {dotted(path)}, which the fused forward does not call"
        now = layer.__dict__
        if "forward" in now:
            return f"the forward of {dotted(path)} was replaced"
        if tuple(map(now.get, names)) != values:
            name, value = next((n, v) for n, v in zip(names, values, strict=True) if now.get(n) != v)
            return f"{name} of {dotted(path)} is now {now.get(name)!r}, not {value!r}"
        if (layer._modules or children) and tuple(layer._modules) != children:
            return f"{dotted(path)} now holds {_listed(layer._modules)}, not {_listed(children)}"
        if reads and _biased(layer) != biased:
            return f"{dotted(path)} now has {'no' if biased else 'a'} bias"
    for path in weighted if reads else ():
        layer = follow(module, path)
        if type(layer._parameters.get("weight")) is not nn.Parameter and not is_plain(layer.weight):
            return f"the weight of {dotted(path)} is now {kind_of(layer.weight)}"
    return None


def _biased(layer: nn.Module) -> bool:
    # A name without a value says that there is none; FullyShardedDataParallel takes the names away.
    return layer._parameters.get("bias", "elsewhere") is not None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook waits for a call of ``module`` or for its gradients."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def settings_of(module: nn.Module, *skip: str) -> tuple[tuple[str, Any], ...]:
    """The plain attributes of ``module`` but ``training``, private ones and ``skip``."""
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in ("training", *skip) and is_setting(value)
    )


def is_setting(value: Any) -> bool:
    """Whether an attribute is plain data."""
    if isinstance(value, tuple):
        return all(is_setting(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def is_plain(weight: Any) -> bool:
    """Whether a weight is PyTorch's own kind of tensor (also when sharded, traced or faked), not a quantised one."""
    kind = type(weight)
    return kind in (nn.Parameter, Tensor) or kind.__module__.split(".")[0] == "torch"


def dotted(path: Path) -> str:
    """A path as people write it."""
    return ".".join(path)


def kind_of(value: Any) -> str:
    """The name of the class of ``value``."""
    return type(value).__name__
