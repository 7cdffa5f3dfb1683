"""The four naming schemes of ConvNeXt's tensors: recognising them from the keys, and converting between them.

The other three are translated to and from timm's names. Sources: the state dicts of facebookresearch/ConvNeXt and
ConvNeXt-V2, transformers, timm and torchvision, loaded with one set of weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor

from ..config import VARIANTS, ConvNextConfig, ConvNextV2Config

# i: stage; j: block. torchvision counts stages and what lies between them in one list, hence {even} = 2i, {odd} = 2i+1.
_TABLE = """
            timm                    torchvision        transformers                            official
stem_conv   stem.0                  features.0.0       embeddings.patch_embeddings             downsample_layers.0.0
stem_norm   stem.1                  features.0.1       embeddings.layernorm                    downsample_layers.0.1
down_norm   stages.{i}.downsample.0 features.{even}.0  encoder.stages.{i}.downsampling_layer.0 downsample_layers.{i}.0
down_conv   stages.{i}.downsample.1 features.{even}.1  encoder.stages.{i}.downsampling_layer.1 downsample_layers.{i}.1
block       stages.{i}.blocks.{j}   features.{odd}.{j} encoder.stages.{i}.layers.{j}           stages.{i}.{j}
dwconv      +conv_dw                +block.0           +dwconv                                 +dwconv
block_norm  +norm                   +block.2           +layernorm                              +norm
fc1         +mlp.fc1                +block.3           +pwconv1                                +pwconv1
grn         +mlp.grn                -                  +grn                                    +grn
fc2         +mlp.fc2                +block.5           +pwconv2                                +pwconv2
layer_scale +gamma                  +layer_scale       +layer_scale_parameter                  +gamma
norm        head.norm               classifier.0       layernorm                               norm
classifier  head.fc                 classifier.2       classifier                              head
"""
"""The names of layers; + stands for the block's, - for none."""


def _read_table() -> dict[str, dict[str, str]]:
    formats, *rows = (line.split() for line in _TABLE.strip().splitlines())
    layers = {format: {part: names[i] for part, *names in rows if names[i] != "-"} for i, format in enumerate(formats)}
    for names in layers.values():
        block = names.pop("block")
        names.update({part: name.replace("+", f"{block}.") for part, name in names.items()})
    layers["timm"]["norm_before_pool"] = "norm_pre"
    return layers


_LAYERS = _read_table()
FORMATS = tuple(_LAYERS)
_PREFIXES = "convnext.", "convnextv2."
"""Of transformers' keys for V1 and V2, if there is a classifier."""
_OFFICIAL_GRN = {".weight": ".gamma", ".bias": ".beta"}
BACKBONE_NORMS = "hidden_states_norms."


def recognise(keys: Iterable[str]) -> str:
    """The format, one of ``FORMATS``, of a state dict's keys; a ValueError names another architecture where known."""
    names = list(keys)
    if not names:
        raise ValueError("the checkpoint holds no tensors")
    sample = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    if any(re.search(r"^norms\.|\.depthwise_conv\.|\.pointwise_conv1\.", name) for name in names):
        raise ValueError(f"these are the keys of DINOv3's ConvNeXt ({sample}): expected a ConvNeXt of {FORMATS}")
    parts = {format: [_parse(name, format) for name in names] for format in FORMATS}
    best = max(FORMATS, key=lambda format: sum(part is not None for part in parts[format]))
    known = [part[0] for part in parts[best] if part is not None]
    if 2 * len(known) < len(names) or ("fc1" in known and "dwconv" not in known):
        raise ValueError(f"these are not the keys of a ConvNeXt in any of the formats {FORMATS}: {sample}")
    return best


def from_sparse(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The encoder of ConvNeXt V2's sparse pre-training under the official names; any other state dict as it is.

    Its convolutions hold (taps, C) or (taps, C, C'), the taps column by column.
    """
    if not any(key.endswith(".kernel") for key in state_dict):
        return state_dict
    dense = {}
    for key, tensor in state_dict.items():
        if key.startswith(("mask_token", "proj.", "decoder.", "pred.")):
            continue
        key = re.sub(r"^encoder\.|\.(?:ln|linear)(?=\.)", "", key)
        side = math.isqrt(len(tensor)) if tensor.dim() in (2, 3) else 0
        if key.endswith(".kernel") and side * side == len(tensor):
            key = key.removesuffix("kernel") + "weight"
            taps = tensor[:, None] if tensor.dim() == 2 else tensor
            tensor = taps.unflatten(0, (side, side)).permute(3, 2, 1, 0)
        elif key.endswith(".bias") and tensor.dim() == 2:
            tensor = tensor.flatten()
        dense[key] = tensor
    return dense


def to_timm(state_dict: Mapping[str, Tensor], format: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict of ``format`` under timm's names, and the tensors that timm has no name for, under their own.

    Linear layers kept as 1×1 convolutions become (out, in), torchvision's (C, 1, 1) layer scales (C,), and V2's (1, 1,
    1, K) parameters of the global response norm (K,). All are views. timm's ``features_only`` names (``stages_0.…``)
    and transformers' keys with and without ``convnext.`` are understood; a transformers backbone's
    ``hidden_states_norms`` are among the tensors without a name.

    Raises:
        ValueError: ``format`` is unknown, or two keys mean the same tensor.
    """
    named: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        parsed = _parse(key, _checked(format))
        if parsed is None:
            others[key] = tensor
            continue
        part, i, j, suffix = parsed
        name = _render(part, i, j, suffix, "timm")
        if name in named:
            raise ValueError(f"the checkpoint holds {name} twice, once as {key}")
        if part in ("fc1", "fc2") and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        elif part == "layer_scale" and format == "torchvision" and tensor.dim() == 3 and tensor.shape[1:] == (1, 1):
            tensor = tensor.flatten()
        elif part == "grn" and tensor.dim() and tensor.numel() == tensor.shape[-1]:
            tensor = tensor[(0,) * (tensor.dim() - 1)]
        named[name] = tensor
    return named, others


def from_timm(
    state_dict: Mapping[str, Tensor],
    format: str,
    extra: Mapping[str, Tensor] | None = None,
    global_pool: str = "avg",
) -> dict[str, Tensor]:
    """A state dict under timm's names in ``format``; the inverse of `to_timm`.

    transformers' keys get the prefix ``convnext.`` if there is a classifier. ``extra``: a transformers backbone's
    ``hidden_states_norms``, which only that format can hold; ``global_pool``: the model's pooling.

    Raises:
        ValueError: ``format`` has no name for a tensor, such as a norm before pooling anywhere but in timm, or no such
            pooling.
    """
    if global_pool == "max" and format != "timm":
        raise ValueError(f"the model uses max pooling, which the {format} format cannot express: expected timm")
    names = {key: rename(key, "timm", format) for key in state_dict}
    lost = [key for key, name in names.items() if name is None]
    if format != "transformers" or any(not key.startswith(BACKBONE_NORMS) for key in extra or ()):
        lost += list(extra or ())
    if lost:
        reason = "; its norm comes before the pooling, which only timm has" if "norm_pre.weight" in lost else ""
        if any(".grn." in key for key in lost):
            reason = "; it is a ConvNeXt V2, which torchvision does not have"
        raise ValueError(f"the {format} format has no name for {', '.join(lost[:10])}{reason}")
    prefix = ""
    if format == "transformers" and "head.fc.weight" in state_dict:
        prefix = _PREFIXES[any(".grn." in key for key in state_dict)]
    converted = {}
    for key, tensor in state_dict.items():
        if format == "torchvision" and key.endswith(".gamma") and tensor.dim() == 1:
            tensor = tensor[:, None, None]
        elif format in ("transformers", "official") and ".grn." in key and tensor.dim() == 1:
            tensor = tensor[None, None, None]
        name = str(names[key])
        converted[name if name.startswith("classifier.") else prefix + name] = tensor
    return converted | dict(extra or {})


def rename(key: str, source: str, target: str) -> str | None:
    """What ``target`` calls the tensor ``key`` of ``source``, without prefix; None if it has no name for it."""
    parsed = _parse(key, _checked(source))
    return None if parsed is None or parsed[0] not in _LAYERS[_checked(target)] else _render(*parsed, target)


def infer_config(state_dict: Mapping[str, Tensor], format: str = "timm") -> ConvNextConfig:
    """The configuration that fits the shapes of a state dict under timm's names.

    Without a classifier, ``num_labels`` is 0. ``format``, the tensors' original one, decides the epsilons: 1e-12 in
    transformers' last norm, 1e-5 in timm's xxlarge, otherwise 1e-6. The activation is assumed to be GELU. With a global
    response norm it is a `ConvNextV2Config`.

    Raises:
        ValueError: the stem is missing or has a wrong shape, or stages are missing.
    """
    stem = state_dict.get("stem.0.weight")
    if stem is None or stem.dim() != 4:
        shape = "missing" if stem is None else f"of shape {tuple(stem.shape)}"
        raise ValueError(
            f"the stem's convolution stem.0.weight is {shape}: expected (channels, in_chans, height, width)"
        )
    widths, depths = {0: stem.shape[0]}, {0: 0}
    for key, tensor in state_dict.items():
        part, i, j, suffix = _parse(key, "timm") or ("", 0, 0, "")
        if part in ("down_conv", "dwconv") and suffix == ".weight" and (part == "down_conv" or i not in widths):
            widths[i] = tensor.shape[0] if tensor.dim() else 0
        if part in ("dwconv", "block_norm", "fc1", "grn", "fc2", "layer_scale"):
            depths[i] = max(depths.get(i, 0), j + 1)
    count = max(*widths, *depths, 0) + 1
    if count > len(state_dict) or max(depths.values()) > len(state_dict):
        raise ValueError(f"the checkpoint numbers {count} stages and {max(depths.values())} blocks in one: too many")
    missing = [i for i in range(count) if i not in widths]
    if missing:
        raise ValueError(f"the checkpoint has {count} stages, but no downsampling convolution for stage {missing[0]}")
    hidden_sizes, blocks = tuple(widths[i] for i in range(count)), tuple(depths.get(i, 0) for i in range(count))
    classifier = state_dict.get("head.fc.weight")
    fields: dict[str, Any] = {"layer_norm_eps": 1e-12 if format == "transformers" else 1e-6}
    if format == "timm" and (blocks, hidden_sizes) == VARIANTS["xxlarge"]:
        fields = {"layer_norm_eps": 1e-5, "norm_eps": 1e-5}
    height, width = stem.shape[2:]
    kind = ConvNextV2Config if any(".grn." in key for key in state_dict) else ConvNextConfig
    return kind(
        num_channels=stem.shape[1],
        patch_size=height if height == width else (height, width),
        num_stages=count,
        hidden_sizes=hidden_sizes,
        depths=blocks,
        layer_scale_init_value=1e-6 if any(key.endswith(".gamma") for key in state_dict) else 0.0,
        num_labels=0 if classifier is None or not classifier.dim() else classifier.shape[0],
        **fields,
    )


def _checked(format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}: expected one of {', '.join(FORMATS)}")
    return format


@cache
def _patterns(format: str) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Each layer's name as a pattern; the stem before the downsampling layers, whose patterns it would match."""
    number = r"(?P<\1>0|[1-9]\\d{0,8})"
    compiled = []
    for part, template in _LAYERS[format].items():
        pattern = re.sub(r"\\{(\w+)\\}", number, re.escape(template))
        suffix = "" if part == "layer_scale" else r"\.(?:weight|bias)"
        if part == "grn" and format == "official":
            suffix = r"\.(?:gamma|beta)"
        compiled.append((part, re.compile(f"{pattern}(?P<suffix>{suffix})")))
    return tuple(compiled)


def _parse(key: str, format: str) -> tuple[str, int, int, str] | None:
    """(layer, stage, block, suffix) of a key; None where the format has no such key."""
    if format == "timm":
        key = re.sub(r"^(stem|stages)_(\d+)\.", r"\1.\2.", key)
    elif format == "transformers":
        key = key.removeprefix(_PREFIXES[0]).removeprefix(_PREFIXES[1])
    for part, pattern in _patterns(format):
        match = pattern.fullmatch(key)
        if match:
            found = match.groupdict()
            doubled = int(found.get("even") or found.get("odd") or 0)
            if ("even" in found and doubled % 2) or ("odd" in found and doubled % 2 == 0):
                continue
            i = int(found.get("i") or doubled // 2)
            if i == 0 and part.startswith("down_"):
                continue
            suffix = found["suffix"]
            suffix = next((ours for ours, theirs in _OFFICIAL_GRN.items() if theirs == suffix), suffix)
            return part, i, int(found.get("j") or 0), suffix
    return None


def _render(part: str, i: int, j: int, suffix: str, format: str) -> str:
    if part == "grn" and format == "official":
        suffix = _OFFICIAL_GRN[suffix]
    return _LAYERS[format][part].format(i=i, j=j, even=2 * i, odd=2 * i + 1) + suffix
