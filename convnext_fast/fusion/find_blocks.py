"""Recognise the ConvNeXt blocks of other libraries by their layers, not by their names.

A block is the smallest module (not a `torch.nn.Sequential`) whose layers are, in the order of registration: a depthwise
2-d convolution, a norm, a pointwise layer (linear or 1×1), …, a second pointwise layer. A global response norm may come
anywhere after the first pointwise layer. `make_plan` says where the parts of a block are, or why the fused ops cannot
replace it; `confirm` then runs the block to confirm the plan. Nothing here changes a module.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..backends.reference import ACTIVATION_FUNCTIONS
from ..kernels.weights import GRN_EPS
from ..models.layer_changes import dotted, kind_of, own_tensors
from ..models.plan import BlockPlan, Path, watch
from .layer_kinds import DTYPES, Unfusable, check_forward, check_norm, check_untouched, check_weights
from .probe_copy import probe_copy

KERNEL_SIZES = (3, 5, 7)
RATES = ("drop_prob", "p", "rate")
"""Libraries' names for the rate of stochastic depth."""


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of ``model`` that looks like a ConvNeXt block, fusable or not, with its name."""
    found: list[tuple[str, nn.Module]] = []
    _collect(model, "", found, {})
    return found


def _collect(module: nn.Module, name: str, found: list[tuple[str, nn.Module]], seen: dict[int, bool]) -> bool:
    """Append the blocks at or under ``module`` that were not seen before, and return whether there are any."""
    if id(module) not in seen:
        inner = [
            _collect(child, f"{name}.{key}" if name else key, found, seen)
            for key, child in module.named_children()
            if not _is_layer(child)
        ]
        block = not any(inner) and type(module).forward is not nn.Sequential.forward and _looks_like_block(module)
        if block:
            found.append((name, module))
        seen[id(module)] = block or any(inner)
    return seen[id(module)]


def make_plan(block: nn.Module) -> BlockPlan:
    """Where the parts of ``block`` are; `Unfusable` with the reason if the fused ops cannot replace it."""
    check_forward(block)
    if parametrize.is_parametrized(block):
        raise Unfusable("its layer scale is parametrised")
    check_untouched((name, module) for name, module in block.named_modules() if module is not block)
    everything = list(_layers(block))
    layers = [(path, layer) for path, layer in everything if not isinstance(layer, nn.Identity)]
    places = [i for i, (_, layer) in enumerate(layers) if _is_pointwise(layer)]
    dwconv, norm = [(path, layer) for path, layer in layers if _holds_tensors(layer)][:2]
    fc1, fc2 = layers[places[0]], layers[places[1]]
    channels = _check_dwconv(*dwconv)
    check_norm(*norm, channels)
    hidden = _check_linear(fc1, fc2, channels)
    grn = _find_grn(layers[places[0] + 1 :], hidden)
    between, outside = layers[places[0] + 1 : places[1]], layers[: places[0]] + layers[places[1] + 1 :]
    between, outside = ([pair for pair in part if pair != grn] for part in (between, outside))
    drop_path = _find_drop_path(outside)
    known = {id(layer) for _, layer in (dwconv, norm)}
    for path, layer in outside:
        if id(layer) not in known and _holds_tensors(layer):
            raise Unfusable(
                f"it also holds {dotted(path)} ({kind_of(layer)}), which is not a layer of a ConvNeXt block"
            )
    act = _find_activation(between)
    _check_plain_weights(fc1, fc2, dwconv, norm, *([] if grn is None else [grn]))
    containers = dict.fromkeys(path[:n] for path, _ in everything for n in range(1, len(path)))
    rate = "" if drop_path is None else next(name for name in RATES if hasattr(drop_path[1], name))
    return BlockPlan(
        dwconv=dwconv[0],
        norm=norm[0],
        fc1=fc1[0],
        fc2=fc2[0],
        gamma=_find_gamma(block, channels),
        drop_path=None if drop_path is None else drop_path[0],
        rate=rate,
        act=act,
        watched=tuple(
            watch(block, path, rate if drop_path and path == drop_path[0] else "")
            for path in [*containers, *(path for path, _ in everything)]
        ),
        grn=None if grn is None else grn[0],
        grn_names=() if grn is None else tuple(grn[1]._parameters),
    )


def _layers(module: nn.Module, path: Path = ()) -> Iterator[tuple[Path, nn.Module]]:
    """The innermost layers of ``module`` in the order of registration."""
    for name, child in module.named_children():
        if _is_layer(child):
            yield (*path, name), child
        else:
            yield from _layers(child, (*path, name))


def _is_layer(module: nn.Module) -> bool:
    children = any(name != "parametrizations" for name, _ in module.named_children())
    return not children or _is_pointwise(module) or _is_depthwise(module)


def _is_depthwise(module: nn.Module) -> bool:
    groups, kernel = getattr(module, "groups", None), getattr(module, "kernel_size", None)
    two = isinstance(kernel, tuple) and len(kernel) == 2
    return two and isinstance(groups, int) and 1 < groups == getattr(module, "in_channels", None)


def _is_pointwise(module: nn.Module) -> bool:
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return True
    return getattr(module, "kernel_size", None) == (1, 1) and getattr(module, "groups", None) == 1


def _holds_tensors(module: nn.Module) -> bool:
    tensors = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    return tensors or _is_pointwise(module) or _is_depthwise(module) or hasattr(module, "eps")


def _looks_like_block(module: nn.Module) -> bool:
    layers = [layer for _, layer in _layers(module) if _holds_tensors(layer) and not isinstance(layer, nn.Identity)]
    return (
        len(layers) >= 4
        and _is_depthwise(layers[0])
        and hasattr(layers[1], "eps")
        and _is_pointwise(layers[2])
        and sum(map(_is_pointwise, layers)) >= 2
        and not any(map(_is_depthwise, layers[1:]))
    )


def _check_dwconv(path: Path, conv: nn.Module) -> int:
    """The channels of a depthwise convolution that the fused ops can run."""
    where = f"its depthwise convolution {dotted(path)}"
    if type(conv).forward is not nn.Conv2d.forward:
        raise Unfusable(f"{where} is {kind_of(conv)}, not a torch.nn.Conv2d")
    if conv.out_channels != conv.in_channels:
        raise Unfusable(f"{where} maps {conv.in_channels} channels to {conv.out_channels}")
    if tuple(conv.stride) != (1, 1):
        raise Unfusable(f"{where} has stride {conv.stride}")
    if tuple(conv.dilation) != (1, 1):
        raise Unfusable(f"{where} has dilation {conv.dilation}")
    side = conv.kernel_size[0]
    if conv.kernel_size != (side, side) or side not in KERNEL_SIZES:
        raise Unfusable(f"{where} has kernel {conv.kernel_size}: expected a square one of side 3, 5 or 7")
    if conv.padding not in ("same", (side // 2, side // 2)) or conv.padding_mode != "zeros":
        raise Unfusable(f"{where} has padding {conv.padding!r} of mode {conv.padding_mode!r}: expected the same size")
    return conv.in_channels


def _check_linear(fc1: tuple[Path, nn.Module], fc2: tuple[Path, nn.Module], channels: int) -> int:
    """The hidden width of two linear layers or 1×1 convolutions."""
    sizes = []
    for _, layer in (fc1, fc2):
        conv = hasattr(layer, "in_channels")
        names = ("in_channels", "out_channels") if conv else ("in_features", "out_features")
        sizes.append(tuple(getattr(layer, name) for name in names))
        if conv and (tuple(layer.stride) != (1, 1) or layer.padding not in ((0, 0), "same", "valid")):
            raise Unfusable(f"its 1×1 convolutions have stride {layer.stride} and padding {layer.padding}")
    if sizes[1] != sizes[0][::-1] or sizes[0][0] != channels:
        raise Unfusable(f"its linear layers map {sizes[0]} and {sizes[1]}: expected ({channels}, K), (K, {channels})")
    return sizes[0][1]


def _check_plain_weights(*layers: tuple[Path, nn.Module]) -> None:
    """Weights that the fused ops can read: floating, ordinary tensors on ordinary layers."""
    plain = (nn.Linear.forward, nn.Conv2d.forward)
    for path, layer in layers:
        where = f"{dotted(path)} ({kind_of(layer)})"
        if _is_pointwise(layer) and type(layer).forward not in plain:
            raise Unfusable(f"{where} is quantised or adapted: neither a torch.nn.Linear nor a torch.nn.Conv2d")
        check_weights(path, layer)
        if _is_pointwise(layer) and layer.bias is None:
            raise Unfusable(f"{where} has no bias")


def _find_gamma(block: nn.Module, channels: int) -> str | None:
    own = {name: tensor for name, tensor in own_tensors(block) if tensor is not None}
    if not own:
        return None
    (name, gamma), *more = own.items()
    if more or gamma.numel() != channels or name not in block._parameters or gamma.dtype not in DTYPES:
        words = ", ".join(f"{name} {tuple(value.shape)}" for name, value in own.items())
        raise Unfusable(f"its own tensors are {words}: expected none, or a layer scale of {channels} elements")
    return name


def _find_drop_path(layers: list[tuple[Path, nn.Module]]) -> tuple[Path, nn.Module] | None:
    found = None
    for path, layer in layers:
        if _holds_tensors(layer) or _is_idle_dropout(path, layer):
            continue
        if any(isinstance(getattr(layer, name, None), (int, float)) for name in RATES):
            if found is not None:
                raise Unfusable(f"it has two stochastic depths, {dotted(found[0])} and {dotted(path)}")
            found = path, layer
    return found


def _is_idle_dropout(path: Path, layer: nn.Module) -> bool:
    if not isinstance(layer, nn.modules.dropout._DropoutNd):
        return False
    if layer.p > 0:
        raise Unfusable(f"{dotted(path)} drops activations at rate {layer.p}")
    return True


def _find_grn(layers: list[tuple[Path, nn.Module]], hidden: int) -> tuple[Path, nn.Module] | None:
    """The layer with two parameters of ``hidden`` elements and nothing else."""
    found = [(path, layer) for path, layer in layers if [p.numel() for p in layer.parameters()] == [hidden, hidden]]
    if not found:
        return None
    path, layer = found[0]
    where = f"{dotted(path)} ({kind_of(layer)})"
    if len(found) > 1 or len(layer._parameters) != 2 or next(layer.buffers(), None) is not None:
        raise Unfusable(f"{where} is not the one global response norm of a ConvNeXt V2 block")
    if getattr(layer, "eps", GRN_EPS) != GRN_EPS:
        raise Unfusable(f"eps of {where} is {layer.eps}: expected {GRN_EPS} of a global response norm")
    return path, layer


def _find_activation(between: list[tuple[Path, nn.Module]]) -> str:
    """The activation between the linear layers."""
    layers = [(path, layer) for path, layer in between if not _is_idle_dropout(path, layer)]
    names = ", ".join(f"{dotted(path)} ({kind_of(layer)})" for path, layer in layers) or "nothing"
    if len(layers) != 1:
        raise Unfusable(f"between its linear layers it has {names}: expected an activation, or one and a GRN")
    return _recognise_activation(*layers[0])


@torch.no_grad()
def _recognise_activation(path: Path, layer: nn.Module) -> str:
    """The activation that ``layer`` computes, whatever its name."""
    x = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64, device="cpu")
    if not _holds_tensors(layer):
        copy = probe_copy(layer)
        outputs = [copy.train(mode)(x.clone()) for mode in (False, True)]
        for name, function in ACTIVATION_FUNCTIONS.items():
            if all((y - function(x)).abs().max() <= 1e-9 for y in outputs):
                return name
    known = ", ".join(ACTIVATION_FUNCTIONS)
    raise Unfusable(f"its activation {dotted(path)} ({kind_of(layer)}) is none of {known}")
