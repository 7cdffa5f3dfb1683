"""The ``config.json`` next to the weights, in transformers' form, in timm's, and in ours."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..config import VARIANTS, ConvNextConfig
from ..config.base import SECTION
from ..files import local_path, read_json
from ..huggingface.hub import ANYWHERE, Loading, find_file

_TIMM_ACTIVATIONS = {"gelu_tanh": "gelu_new", "swish": "silu"}


class SavedConfig(NamedTuple):
    """What a ``config.json`` says."""

    config: ConvNextConfig | None  # None if it has to be inferred from the tensors
    overrides: dict[str, Any]  # fields that do not follow from the tensors, which replace the inferred ones
    global_pool: str = "avg"  # of a timm model


def read_config(source: str | Path, loading: Loading = ANYWHERE) -> SavedConfig:
    """Read ``config.json`` of a folder or hub id, of transformers, of timm, or one written by `config_fields`."""
    try:
        path = find_file(source, "config.json", loading=loading)
    except FileNotFoundError as error:
        if not local_path(source).is_dir():
            raise
        if (local_path(source) / "model" / "config.json").is_file():
            raise FileNotFoundError(f"{error}: it is a training run, whose model is in {source}/model") from None
        raise FileNotFoundError(
            f"{error}: give the weights file itself to infer the configuration from its tensors, or pass config="
        ) from None
    fields = read_json(path)
    arguments = fields.get("model_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    pool = arguments.get("global_pool", "avg")
    if not {SECTION, "model_type"} & fields.keys() and "architecture" in fields:
        architecture = str(fields["architecture"])
        if not architecture.startswith(("convnext_", "convnextv2_")):
            raise ValueError(
                f"{path} describes timm's {architecture!r}: expected one of its 'convnext_…' and 'convnextv2_…' models"
            )
        return SavedConfig(None, _timm_amendments(fields, arguments), pool)
    return SavedConfig(ConvNextConfig.from_file(path), {}, pool)


def config_fields(
    config: ConvNextConfig, format: str, keys: Collection[str], dtype: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of ``config.json`` for tensors called ``keys`` in ``format``, of a ``dtype`` such as "float32".

    ``options``: ``head_norm_first`` and ``global_pool`` of a timm model.
    """
    if format == "transformers":
        fields = config.to_dict()
        cls = "Model" if "layernorm.weight" in keys else "Backbone"
        if "classifier.weight" in keys:
            cls = "ForImageClassification"
        version = "V2" if config.version == 2 else ""
        named = {"architectures": [f"ConvNext{version}{cls}"]} if keys else {}
        return fields | named | {"dtype": dtype}
    fields = {SECTION: config.to_dict(), "checkpoint_format": format}
    return fields | _timm_fields(config, options) if format == "timm" else fields


def warn_of_lost_fields(config: ConvNextConfig, format: str, *, with_config: bool) -> None:
    """Warn if the library behind ``format`` computes with another activation or epsilon than the configuration's.

    Epsilons may differ by 1e-6: logits then still agree to float32's accuracy.
    """
    inner = config.norm_eps if format == "timm" else 1e-6
    last = config.layer_norm_eps if format == "transformers" else inner
    losses = [
        f"{name}={theirs:g} instead of {ours:g}"
        for name, theirs, ours in (
            ("norm_eps", inner, config.norm_eps),
            ("layer_norm_eps", last, config.layer_norm_eps),
        )
        if abs(ours - theirs) > 1.001e-6
    ]
    if config.activation != "gelu" and (format in ("torchvision", "official") or not with_config):
        losses.append(f"the activation gelu instead of {config.hidden_act}")
    if losses:
        warnings.warn(f"a reader of the {format} format will compute with {' and '.join(losses)}", stacklevel=3)


def _timm_amendments(fields: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's configuration says that does not follow from the tensors' shapes."""
    pretrained = fields.get("pretrained_cfg")
    pretrained = pretrained if isinstance(pretrained, Mapping) else fields
    overrides: dict[str, Any] = {}
    stride, patch = arguments.get("output_stride", 32), arguments.get("patch_size", 4)
    if stride != 32:
        raise ValueError(f"the model was built with output_stride={stride}, which dilates: expected 32")
    if isinstance(patch, int) and (patch == 2 or patch >= 8):
        raise ValueError(
            f"the model was built with patch_size={patch}, where timm's stages have other strides than ours"
        )
    eps = arguments.get("norm_eps") or (1e-5 if fields["architecture"] == "convnext_xxlarge" else None)
    if eps is not None:
        overrides |= {"norm_eps": eps, "layer_norm_eps": eps}
    if "act_layer" in arguments:
        activation = arguments["act_layer"]
        known = isinstance(activation, str) and _TIMM_ACTIVATIONS.get(activation)
        overrides["hidden_act"] = known or activation
    size = pretrained.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        overrides["image_size"] = size[1] if size[1] == size[2] else size[1:]
    names = fields.get("label_names", pretrained.get("label_names", pretrained.get("labels")))
    described = fields.get("label_descriptions", pretrained.get("label_descriptions"))
    if isinstance(names, list) and names:
        described = described if isinstance(described, Mapping) else {}
        overrides["id2label"] = {
            i: str(described.get(name, name)) if isinstance(name, str) else name for i, name in enumerate(names)
        }
    return overrides


def _timm_fields(config: ConvNextConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as timm's ``create_model("local-dir:…")`` reads it."""
    sizes, is_v2 = (tuple(config.depths), tuple(config.hidden_sizes)), config.version == 2
    names = (name for name, known in VARIANTS.items() if known == sizes and name.startswith("v2_") == is_v2)
    kind, variant = "convnextv2" if is_v2 else "convnext", next(names, "tiny").removeprefix("v2_")
    back = {ours: theirs for theirs, ours in _TIMM_ACTIVATIONS.items() if theirs != "swish"}
    scale = config.layer_scale_init_value
    fields: dict[str, Any] = {
        "architecture": f"{kind}_{variant}",
        "num_classes": config.num_labels,
        "num_features": config.hidden_sizes[-1],
        "global_pool": options["global_pool"],
        "model_args": {
            "in_chans": config.num_channels,
            "depths": list(config.depths),
            "dims": list(config.hidden_sizes),
            "patch_size": config.patch_size,
            "ls_init_value": scale if scale > 0 else None,
            **({"use_grn": True} if is_v2 else {}),
            "norm_eps": config.norm_eps,
            "act_layer": back.get(config.activation, config.activation),
            "conv_mlp": False,
            **options,
        },
        "pretrained_cfg": {"num_classes": config.num_labels, "input_size": [config.num_channels, *config.image_shape]},
    }
    labels = [config.id2label.get(i) for i in range(config.num_labels)]
    if None not in labels and labels != [f"LABEL_{i}" for i in range(config.num_labels)]:
        fields["label_names"] = labels
    return fields
