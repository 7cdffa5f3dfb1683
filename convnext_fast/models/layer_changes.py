"""Whether a plan still holds for a module, or why not: hooks, other layers, other settings, other weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .plan import BlockPlan, ChainPlan, PatchPlan, Path, Plan, follow, holder_of, is_biased, weights_of
from .records import READ


def changed(module: nn.Module, plan: Plan) -> str | None:
    """Why the plan of ``module`` no longer holds, or None."""
    reason = _watched_change(module, plan)
    if reason is None and isinstance(plan, ChainPlan):
        return _container_change(module, plan)
    return _weights_change(module, plan) if reason is None else reason


def is_changed(module: nn.Module, plan: Plan) -> bool:
    """Whether the plan of a `FusedModule` no longer holds.

    While a compiler traces, `changed` runs once, untraced. Only the classes and settings of the layers, and what
    containers hold, are compared in traced code, which leaves guards that PyTorch sets for any layer. The weights are
    guarded where they are read. Tracing all of `changed` would leave thousands of guards more, which take longer than
    the kernels.
    """
    if not torch.compiler.is_compiling():
        return changed(module, plan) is not None
    if module._convnext_fast_changed():
        return True
    for path, kind, names, values, children, _ in plan.watched:
        layer = follow(module, path)
        if type(layer) is not kind or (children and tuple(layer._modules) != children):
            return True
        for name, value in zip(names, values, strict=True):
            if name in READ.get(kind, names) and getattr(layer, name) != value:
                return True
    if isinstance(plan, ChainPlan):
        return _container_change(module, plan) is not None
    return isinstance(plan, PatchPlan) and _pair_change(module, plan) is not None


def _watched_change(module: nn.Module, plan: Plan) -> str | None:
    for path, kind, names, values, children, biased in plan.watched:
        layer = follow(module, path)
        if type(layer) is not kind:
            return f"{dotted(path)} is now {full_name(type(layer))}, not {full_name(kind)}"
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
        if is_biased(layer) != biased:
            return f"{dotted(path)} now has {'no' if biased else 'a'} bias"
    return None


def _weights_change(module: nn.Module, plan: BlockPlan | PatchPlan) -> str | None:
    for path, name in weights_of(plan):
        layer = follow(module, path)
        if type(layer._parameters.get(name)) is not nn.Parameter and not is_plain(getattr(layer, name)):
            return f"the {name} of {dotted(path)} is now {full_name(type(getattr(layer, name)))}"
    gamma = None
    if isinstance(plan, BlockPlan):
        if plan.own:
            return None
        gamma = plan.gamma
        if gamma is not None and getattr(module, gamma, None) is None:
            return f"its {gamma} is gone"
    for name, tensor in own_tensors(module):
        # FullyShardedDataParallel adds a parameter of its own, _flat_param, to the modules that it wraps.
        if tensor is not None and name != gamma and not name.startswith("_"):
            return f"it has a tensor {name} now"
    return _pair_change(module, plan) if isinstance(plan, PatchPlan) else None


def _pair_change(module: nn.Module, plan: PatchPlan) -> str | None:
    names = tuple(follow(module, holder_of(plan))._modules)
    pair = (plan.conv[-1], plan.norm[-1]) if plan.stem else (plan.norm[-1], plan.conv[-1])
    return None if names == pair else f"it now holds {_listed(names)}, not {_listed(pair)}"


def _container_change(module: nn.Module, plan: ChainPlan) -> str | None:
    names = tuple(module._modules)
    if plan.children is not None and names != plan.children:
        return f"it now holds {_listed(names)}, not {_listed(plan.children)}"
    if tuple(map(module.__dict__.get, plan.names)) != plan.values:
        return "its settings changed"
    return None


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    """Names and values of the parameters and buffers of ``module`` itself; absent ones are None."""
    return [*module._parameters.items(), *module._buffers.items()]


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has forward or backward hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain(weight: Any) -> bool:
    """Whether the class of a weight is PyTorch's own (also if sharded, traced or fake), unlike a quantised weight's."""
    kind = type(weight)
    return kind in (nn.Parameter, Tensor) or kind.__module__.split(".")[0] == "torch"


def dotted(path: Path) -> str:
    """A path, joined by dots."""
    return ".".join(path)


def kind_of(value: Any) -> str:
    """The name of the class of ``value``."""
    return type(value).__name__


def full_name(kind: type) -> str:
    """The module and the name of a class; only the name if it is built in."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
