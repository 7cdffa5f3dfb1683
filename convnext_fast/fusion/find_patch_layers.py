"""Recognise the patch layers of other libraries: the stem and the downsampling layers of a ConvNeXt.

Both are a pair of layers, a convolution of non-overlapping patches and a LayerNorm over the channels. The convolution
comes first in the stem, the norm in a downsampling layer. Either a module holds only the pair (timm, torchvision, the
stem of transformers); or the pair is a list in a stage, which calls it before its blocks (transformers) and then gets
the fused forward. As for blocks, `confirm` runs the module to confirm each plan, and nothing here changes a module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from ..models.layer_changes import dotted, kind_of, own_tensors
from ..models.plan import PatchPlan, Path, follow, watch
from .layer_kinds import Unfusable, check_forward, check_norm, check_untouched, check_weights


class PatchLayer(NamedTuple):
    """What looks like a patch layer."""

    name: str  # of the module that holds the pair
    runner: nn.Module  # that module or, if it is a list, its parent
    path: Path  # from the runner to the holder


def find_patch_layers(model: nn.Module, blocks: Iterable[nn.Module]) -> list[PatchLayer]:
    """What looks like a patch layer in ``model``, fusable or not, outside its ConvNeXt blocks."""
    inside = {id(module) for block in blocks for module in block.modules()}
    found = []
    for name, module in model.named_modules():
        if id(module) in inside or not _looks_like_patches(module):
            continue
        if not isinstance(module, nn.ModuleList):
            found.append(PatchLayer(name, module, ()))
        elif name:
            parent, _, key = name.rpartition(".")
            found.append(PatchLayer(name, model.get_submodule(parent), (key,)))
    return found


def make_patch_plan(layer: PatchLayer) -> PatchPlan:
    """Where the parts of ``layer`` are; `Unfusable` with the reason if the fused ops cannot replace it."""
    runner, holder = layer.runner, follow(layer.runner, layer.path)
    pair = [((*layer.path, name), child) for name, child in holder.named_children()]
    if parametrize.is_parametrized(runner):
        raise Unfusable(f"the {kind_of(runner)} that runs it is parametrised")
    own = [name for name, tensor in own_tensors(runner) if tensor is not None]
    if own:
        raise Unfusable(f"the {kind_of(runner)} that runs it has tensors of its own: {', '.join(own)}")
    check_forward(runner)
    following = _following(layer) if layer.path else None
    check_untouched((dotted(path), child) for path, child in pair)
    stem = not hasattr(pair[0][1], "eps")
    (norm_path, norm), (conv_path, conv) = pair[::-1] if stem else pair
    check_norm(norm_path, norm, _check_conv(conv_path, conv)[0 if stem else 1])
    for path, child in pair:
        check_weights(path, child)
    if norm.weight is None or norm.bias is None:
        raise Unfusable(f"its LayerNorm {dotted(norm_path)} has no affine, which the fused patch layers need")
    watched = [path for path, _ in pair]
    if following is not None:
        watched = [layer.path, following, *watched]
    return PatchPlan(norm_path, conv_path, stem, tuple(watch(runner, path) for path in watched), following)


def _looks_like_patches(module: nn.Module) -> bool:
    """Whether a module holds a dense convolution and a norm and nothing else.

    Other networks have such pairs too. If the convolution comes first, its patches must not overlap and the norm must
    be a LayerNorm; otherwise one of the two is enough.
    """
    layers = list(module.children())
    convs = [_is_dense(layer) for layer in layers]
    norms = [hasattr(layer, "eps") for layer in layers]
    if len(layers) != 2 or sorted(convs) != [False, True] or norms != [not conv for conv in convs]:
        return False
    conv, norm = layers if convs[0] else layers[::-1]
    patches, layer_norm = conv.stride == conv.kernel_size, hasattr(norm, "normalized_shape")
    return patches and layer_norm if convs[0] else patches or layer_norm


def _is_dense(module: nn.Module) -> bool:
    """Whether a module looks like a 2-d convolution of more than one pixel that is not transposed."""
    kernel, stride = getattr(module, "kernel_size", None), getattr(module, "stride", None)
    two = isinstance(kernel, tuple) and isinstance(stride, tuple) and len(kernel) == len(stride) == 2
    return (
        two and kernel != (1, 1) and getattr(module, "groups", None) == 1 and not getattr(module, "transposed", False)
    )


def _following(layer: PatchLayer) -> Path:
    """The other list of a stage, whose modules it calls after the pair."""
    others = [(name, child) for name, child in layer.runner.named_children() if name != layer.path[0]]
    if len(others) != 1 or not isinstance(others[0][1], nn.ModuleList):
        names = ", ".join(f"{name} ({kind_of(child)})" for name, child in others) or "nothing"
        raise Unfusable(f"the {kind_of(layer.runner)} that runs it also holds {names}: expected only a list of blocks")
    return (others[0][0],)


def _check_conv(path: Path, conv: nn.Module) -> tuple[int, int]:
    """The output and input channels of a convolution that the fused ops can run."""
    where = f"its convolution {dotted(path)}"
    if type(conv).forward is not nn.Conv2d.forward:
        raise Unfusable(f"{where} is {kind_of(conv)}, not a torch.nn.Conv2d")
    if tuple(conv.dilation) != (1, 1):
        raise Unfusable(f"{where} has dilation {conv.dilation}")
    if tuple(conv.stride) != tuple(conv.kernel_size):
        raise Unfusable(f"{where} has kernel {conv.kernel_size} and stride {conv.stride}: expected the same")
    if conv.padding not in ((0, 0), "valid"):
        raise Unfusable(f"{where} has padding {conv.padding!r}: expected none")
    return conv.out_channels, conv.in_channels
