"""`fuse` and `unfuse`: ConvNeXts of transformers, timm, torchvision and others on the fused ops.

A model of another library is a host. `fuse` gives its blocks, stem and downsampling layers a new class, a subclass of
the host's with another ``forward`` (as FSDP2 does). Nothing else changes: parameters, buffers, keys, hooks on blocks,
`isinstance`, class names. Each call reads the host's live parameters. If the module has changed since it was fused, the
call runs the host's own forward and warns.
"""

from __future__ import annotations

import functools
import inspect
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..models.ahead import computed_ahead
from ..models.freezing import set_plan, state_of, unfreeze
from ..models.fused_module import FusedModule, fused_forward
from ..models.layer_changes import changed
from ..models.layers import ConvNextBlockBase
from ..models.plan import BlockPlan, ChainPlan, PatchPlan, Plan, holder_of, settings_of
from ..models.records import STATE
from ..models.whole_runs import runs_as_steps
from .confirm import confirm
from .find_blocks import find_blocks, make_plan
from .find_chains import find_chains, find_parts
from .find_patch_layers import PatchLayer, find_patch_layers, make_patch_plan
from .layer_kinds import Unfusable, others_of, takes_keywords
from .report import FuseReport


def fuse(model: nn.Module, *, recompute: int | None = None, strict: bool = False) -> FuseReport:
    """Make the ConvNeXt blocks, the stem and the downsampling layers of ``model`` run on the fused ops, in place.

    Parameters, ``state_dict`` keys, optimisers, tied and frozen weights do not change. Copies, pickles (which need this
    package to load), autocast, checkpointing, and wrapping afterwards in DistributedDataParallel or with
    ``fully_shard`` go on working. Blocks are recognised by their layers and confirmed by running a copy, so other
    implementations of the block are found too, and the patch layers of models with such blocks. Calling it again
    returns a new report and changes only ``recompute``; a block that has changed since (hooks inside, a layer replaced)
    runs its host's forward and is reported as left alone. `torch.jit.script` refuses the model until `unfuse`.

    Args:
        model: any module; blocks of ``transformers``, ``timm`` and ``torchvision`` ConvNeXts are known to be found.
        recompute: what the backward pass of the blocks recomputes instead of saving, 0, 1 or 2 (see
            `ops.convnext_block`); None does not change it, at first it is 1.
        strict: raise, before anything is changed, if a block or a patch layer is left alone or there is no block.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``recompute`` is not 0, 1, 2 or None; or with ``strict``, with the report as its message.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    if recompute not in (None, 0, 1, 2):
        raise ValueError(f"recompute is {recompute!r}: expected 0, 1 or 2, or None to leave it as it is")
    for module in model.modules():
        # A slice of a fused `torch.nn.Sequential` has its class but is not fused.
        if isinstance(module, FusedHost) and state_of(module) is None:
            module.__class__ = module._convnext_fast_host
    plans: list[tuple[nn.Module, Plan]] = []
    left_alone: dict[str, str] = {}
    fused: list[str] = []
    patches: list[str] = []
    blocks = dict(find_blocks(model))
    blocks |= {name: block for name, block in model.named_modules() if isinstance(block, ConvNextBlockBase)}
    patch_layers = find_patch_layers(model, blocks.values()) if blocks else []
    known: dict[Any, str | None] = {}
    found: list[tuple[str, nn.Module, PatchLayer | None]] = [(name, block, None) for name, block in blocks.items()]
    found += [(layer.name, layer.runner, layer) for layer in patch_layers]
    found += _changed_since_fusing(model, [module for _, module, _ in found])
    for name, module, layer in found:
        try:
            plan = _plan_of(module, layer, known)
        except Unfusable as reason:
            left_alone[name] = str(reason)
            continue
        plans.append((module, plan))
        (fused if layer is None else patches).append(name)
    report = FuseReport(model, tuple(fused), tuple(patches), left_alone)
    if strict and (left_alone or not blocks):
        raise ValueError(f"fuse with strict=True changed nothing:\n{report}")
    for module, plan in plans:
        if recompute is not None and isinstance(plan, BlockPlan):
            plan = plan._replace(recompute=recompute)
        _give(module, plan)
    for module, chain in find_chains(model, {id(module) for module, _ in plans}):
        _give(module, chain)
    for module, chain in find_parts(model):
        _give(module, chain)
    return report


def _give(module: nn.Module, plan: Plan) -> None:
    if not isinstance(module, FusedModule):
        module.__class__ = fused_class(type(module), isinstance(plan, ChainPlan) and bool(plan.parts))
    state = state_of(module)
    if state is None or state.plan != plan:
        set_plan(module, plan)


def unfuse(model: nn.Module) -> None:
    """Give every module that `fuse` changed its own class back.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: another library gave a fused block a class on top of ours.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    fused = {name: module for name, module in model.named_modules() if isinstance(module, FusedHost)}
    for name, module in fused.items():
        if not _is_plainly_fused(module):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(
                f"{name or 'the model'} was given the class {kind} after fuse(), which hides the host's: "
                "call unfuse() before wrapping the model"
            )
    for module in fused.values():
        unfreeze(module)
        module.__class__ = module._convnext_fast_host
        vars(module).pop(STATE, None)


class FusedHost(FusedModule):
    """What `fused_class` puts before a host's class."""

    _convnext_fast_host: type[nn.Module]

    def extra_repr(self) -> str:
        """The host's, and that the module is fused."""
        words = super().extra_repr(), "fused by convnext_fast"
        return ", ".join(filter(None, words))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the host's class: ours cannot be imported by name."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if not _is_plainly_fused(self):
            return reduced
        host = self._convnext_fast_host
        return _new, (host, type(self) is fused_class(host, True)), *reduced[2:]


@runs_as_steps
class FusedHostWithKeywords(FusedHost):
    """`FusedHost` for a host that takes any keyword and reads none, like the stages of transformers' DINOv3."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        y = fused_forward(self, x)
        return self._plain_forward(x, **kwargs) if y is None else y


@functools.cache
def fused_class(host: type[nn.Module], of_parts: bool) -> type[nn.Module]:
    """The subclass of a host's class that runs the fused ops, with the same name.

    of_parts: whether it does more than call its parts one after another (see `ChainPlan`).
    """
    base = FusedHostWithKeywords if takes_keywords(host.forward) else FusedHost
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(host, name) for name in names}
    namespace |= {"_convnext_fast_host": host, "_plain_forward": host.forward}
    if of_parts:
        namespace["forward"] = _with_parts_ahead(host.forward)
    return type(host.__name__, (base, host), namespace)


def _is_plainly_fused(module: FusedHost) -> bool:
    """Whether no other library gave ``module`` a class on top of ours."""
    host = module._convnext_fast_host
    return type(module) in (fused_class(host, False), fused_class(host, True))


def _with_parts_ahead(forward: Any) -> Any:
    """A host's forward; the outputs of its parts are computed before it, as one sequence, from its first argument."""
    first = next(islice(inspect.signature(forward).parameters, 1, None), "")

    @functools.wraps(forward)
    def ahead(self: FusedHost, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with computed_ahead(self, args[0] if args else kwargs.get(first)):
            return forward(self, *args, **kwargs)

    return ahead


def _new(host: type[nn.Module], of_parts: bool = False) -> nn.Module:
    """A fused module without its state."""
    kind = fused_class(host, of_parts)
    return kind.__new__(kind)


def _changed_since_fusing(model: nn.Module, found: list[nn.Module]) -> list[tuple[str, nn.Module, PatchLayer | None]]:
    """The fused modules of ``model``, also this package's own, that no longer look like blocks or patch layers."""
    seen = {id(module) for module in found}
    others: list[tuple[str, nn.Module, PatchLayer | None]] = []
    for name, module in model.named_modules():
        plan = None if id(module) in seen or state_of(module) is None else state_of(module).plan
        if isinstance(plan, PatchPlan):
            layer = PatchLayer(".".join(filter(None, (name, *holder_of(plan)))), module, holder_of(plan))
            others.append((layer.name, module, layer))
        elif isinstance(plan, BlockPlan):
            others.append((name, module, None))
    return others


def _plan_of(module: nn.Module, layer: PatchLayer | None, known: dict[Any, str | None]) -> BlockPlan | PatchPlan:
    """The plan of a block, or of the module that runs a patch layer; `Unfusable` if it must be left alone."""
    state = state_of(module)
    if state is not None:
        plan = state.plan
        if not plan.fused:
            raise Unfusable("it is this package's own, with fused=False")
        if layer is not None and holder_of(plan) != layer.path:
            raise Unfusable(f"the {type(module).__name__} that runs it already runs another patch layer")
        reason = changed(module, plan)
        if reason is not None:
            raise Unfusable(reason)
        return plan
    plan = make_plan(module) if layer is None else make_patch_plan(layer)
    # Of modules that differ only in their weights and their rate of stochastic depth, one is run.
    alike = (type(module), settings_of(module), others_of(module, [layer.path for layer in plan.watched]), plan)
    if alike not in known:
        try:
            confirm(module, plan)
            known[alike] = None
        except Unfusable as reason:
            known[alike] = str(reason)
    if known[alike] is not None:
        raise Unfusable(known[alike])
    return plan
