"""`ConvNextConfig`: the architecture as data, readable and writable as transformers' ``config.json``."""

from __future__ import annotations

import copy
import itertools
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .files import find_file, json_writer, local_path, read_json, write_files

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "selu")
_ACTIVATION_ALIASES = {"swish": "silu"}
SECTION = "convnext_fast"
"""Key of a ``config.json`` under which folders of other formats than transformers' keep the whole configuration."""

# A file of a few bytes can ask for any size. The largest published model, xxlarge with 21,841 classes, has 40 blocks
# and 0.91 billion parameters.
MOST_CHANNELS, MOST_BLOCKS, MOST_LABELS = 1 << 16, 1 << 10, 1 << 17
MOST_SIDE = 1 << 13
"""Of an image, in pixels: the largest square is 0.8 GB in float32."""
MOST_STAGES = 14
"""Each halves the image: the largest is one pixel by then."""
MOST_PARAMETERS = 1 << 30
"""Of a model: 4.3 GB in float32."""
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Depths and widths: tiny to xlarge from the paper, section 3 and appendix A; atto to nano and xxlarge from timm; v2_…
# from the paper of ConvNeXt V2, appendix A, and v2_small from timm.
VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072)),
}
VARIANTS |= {
    f"v2_{name}": VARIANTS[name] for name in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")
} | {"v2_huge": ((3, 3, 27, 3), (352, 704, 1408, 2816))}


class ConvNextConfig:
    """What a ConvNeXt is made of; every field of transformers' ``ConvNextConfig``, with its defaults.

    `ConvNextV2Config` is that of ConvNeXt V2.

    Args:
        num_channels: channels of the input image.
        patch_size: side, or (height, width), of the stem's patches in pixels; also its stride.
        num_stages: number of stages; must equal the lengths of ``hidden_sizes`` and ``depths``.
        hidden_sizes: channels of each stage; None means (96, 192, 384, 768).
        depths: blocks in each stage; None means (3, 3, 9, 3).
        hidden_act: activation between the two linear layers, one of ``ACTIVATIONS``.
        initializer_range: standard deviation of the weights' initial normal distribution.
        layer_norm_eps: epsilon of the last LayerNorm, on pooled features (1e-12 in transformers, 1e-6 elsewhere).
        layer_scale_init_value: initial γ of each block; 0 or less means blocks without layer scale.
        drop_path_rate: stochastic depth of the last block, in [0, 1]; blocks before it grow linearly from 0.
        image_size: side, or (height, width), of the images the model was trained on. Other sizes work too.
        out_features, out_indices: the feature maps that a backbone returns, by name ("stem", "stage1", …) or by
            index (0 is the stem, −1 the last stage). Give either, both if they agree, or neither for the last stage.
        num_labels: number of classes; fixes ``id2label`` to "LABEL_0", … when that is not given. 0 means no classifier.
        id2label, label2id: names of the classes. Keys of ``id2label`` may be strings, as in JSON.
        problem_type: the loss, one of ``PROBLEM_TYPES``, or None to choose from the labels.
        norm_eps: epsilon of every other LayerNorm (stem, blocks, downsampling, backbone).
        **extra: any other key of a ``config.json``; kept, read as an attribute, and written back.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names the field, the value and what is
            allowed.

    Attributes:
        version: 1, or 2 of ConvNeXt V2.
    """

    model_type = "convnext"
    version = 1

    def __init__(
        self,
        /,
        num_channels: int = 3,
        patch_size: int | Sequence[int] = 4,
        num_stages: int = 4,
        hidden_sizes: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        hidden_act: str = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        layer_scale_init_value: float = 1e-6,
        drop_path_rate: float = 0.0,
        image_size: int | Sequence[int] = 224,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        num_labels: int | None = None,
        id2label: Mapping[int | str, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        norm_eps: float = 1e-6,
        **extra: Any,
    ):
        model_type = extra.pop("model_type", self.model_type)
        if model_type != self.model_type:
            raise ValueError(f"model_type is {model_type!r}: expected {self.model_type!r}")
        self.num_channels = _integer("num_channels", num_channels, 1, MOST_CHANNELS)
        self.patch_size = _size("patch_size", patch_size, MOST_SIDE)
        self.num_stages = _integer("num_stages", num_stages, 1, MOST_STAGES)
        widths = (96, 192, 384, 768) if hidden_sizes is None else hidden_sizes
        self.hidden_sizes = _integers("hidden_sizes", widths, 1, MOST_CHANNELS)
        self.depths = _integers("depths", (3, 3, 9, 3) if depths is None else depths, 0, MOST_BLOCKS)
        if sum(self.depths) > MOST_BLOCKS:
            raise ValueError(f"depths is {self.depths}: expected at most {MOST_BLOCKS:,} blocks in all")
        for name, value in (("hidden_sizes", self.hidden_sizes), ("depths", self.depths)):
            if len(value) != self.num_stages:
                raise ValueError(
                    f"{name} is {value}, {len(value)} values: expected one for each of num_stages={self.num_stages}"
                )
        self.hidden_act = hidden_act
        _one_of("hidden_act", hidden_act, (*ACTIVATIONS, *_ACTIVATION_ALIASES))
        self.initializer_range = _real("initializer_range", initializer_range, 0)
        self.layer_norm_eps = _real("layer_norm_eps", layer_norm_eps, 0)
        scale = layer_scale_init_value if self.version == 1 else 0.0
        self.layer_scale_init_value = _real("layer_scale_init_value", scale)
        self.drop_path_rate = _real("drop_path_rate", drop_path_rate, 0, 1)
        self.image_size = _size("image_size", image_size, MOST_SIDE)
        self.norm_eps = _real("norm_eps", norm_eps, 0)
        if problem_type is not None:
            _one_of("problem_type", problem_type, PROBLEM_TYPES)
        self.problem_type = problem_type
        self._set_labels(num_labels, id2label, label2id)
        self._check_parameters()
        extra.pop("stage_names", None)
        self._set_outputs(out_features, out_indices)
        self.extra: dict[str, Any] = extra

    @classmethod
    def from_variant(cls, variant: str, **overrides: Any) -> ConvNextConfig:
        """The configuration of a named variant, one of ``VARIANTS``, with the official code's epsilons.

        Raises:
            ValueError: the name is not one of ``VARIANTS``, or one of another version's.
        """
        if not isinstance(variant, str) or variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}: expected one of {', '.join(VARIANTS)}")
        depths, hidden_sizes = VARIANTS[variant]
        kind = ConvNextV2Config if variant.startswith("v2_") else ConvNextConfig
        if not issubclass(kind, cls):
            raise ValueError(f"variant is {variant!r}, of ConvNeXt V1: expected a name that starts with v2_")
        fields: dict[str, Any] = {"depths": depths, "hidden_sizes": hidden_sizes, "layer_norm_eps": 1e-6}
        if variant == "xxlarge":
            fields |= {"norm_eps": 1e-5, "layer_norm_eps": 1e-5}
        return kind(**{**fields, **overrides})

    @property
    def activation(self) -> str:
        """The ops' name of ``hidden_act`` ("swish" is "silu")."""
        return _ACTIVATION_ALIASES.get(self.hidden_act, self.hidden_act)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(height, width) of the stem's patches."""
        return self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size, self.patch_size)

    @property
    def num_labels(self) -> int:
        """Number of classes; another number gives them new names."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if count != len(self.id2label):
            self._set_labels(count, None, None)

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"this {type(self).__name__} has no field {name!r}")

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps: "stem", "stage1", …"""
        return ["stem", *(f"stage{i + 1}" for i in range(self.num_stages))]

    @property
    def drop_path_rates(self) -> list[list[float]]:
        """Drop-path rate of each block of each stage: linear from 0 to ``drop_path_rate`` over all blocks.

        Rounded to float32, as in timm and transformers, so that 1/(1 − rate) equals theirs to the last bit.
        """
        rates = torch.linspace(0, self.drop_path_rate, sum(self.depths), device="cpu", dtype=torch.float32)
        return [stage.tolist() for stage in rates.split(list(self.depths))]

    def _check_parameters(self) -> None:
        widths, (height, width) = self.hidden_sizes, self.patch_shape
        count = self.num_channels * height * width * widths[0] + widths[-1] * self.num_labels
        count += sum(4 * before * after for before, after in itertools.pairwise(widths))
        count += sum(depth * 8 * channels**2 for depth, channels in zip(self.depths, widths, strict=True))
        if count > MOST_PARAMETERS:
            raise ValueError(
                f"hidden_sizes {widths} and depths {self.depths} make a model of {count:,} parameters: expected at "
                f"most {MOST_PARAMETERS:,}"
            )

    def _set_labels(
        self, num_labels: int | None, id2label: Mapping[int | str, str] | None, label2id: Mapping[str, int] | None
    ) -> None:
        if num_labels is not None:
            _integer("num_labels", num_labels, 0, MOST_LABELS)
        if id2label is None:
            id2label = {i: f"LABEL_{i}" for i in range(2 if num_labels is None else num_labels)}
        if not isinstance(id2label, Mapping):
            raise TypeError(f"id2label is a {type(id2label).__name__}: expected a mapping from class index to name")
        if len(id2label) > MOST_LABELS:
            raise ValueError(f"id2label names {len(id2label):,} classes: expected at most {MOST_LABELS:,}")
        strange = next((name for name in id2label.values() if not isinstance(name, (str, int, float))), None)
        if strange is not None:
            raise TypeError(f"id2label holds a {type(strange).__name__}: expected names of classes")
        try:
            labels = dict(sorted((int(key), value) for key, value in id2label.items()))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"id2label has the keys {list(id2label)[:5]}…: expected class indices") from None
        if num_labels is not None:
            _check_count(num_labels, labels)
        if label2id is not None and not isinstance(label2id, Mapping):
            raise TypeError(f"label2id is a {type(label2id).__name__}: expected a mapping from name to class index")
        self.id2label: dict[int, str] = labels
        self.label2id: dict[str, int] = (
            {name: i for i, name in labels.items()} if label2id is None else dict(label2id.items())
        )

    def _set_outputs(self, out_features: Sequence[str] | None, out_indices: Sequence[int] | None) -> None:
        names = self.stage_names
        if out_features is not None:
            if isinstance(out_features, str) or not isinstance(out_features, Sequence) or not out_features:
                raise TypeError(f"out_features is {out_features!r}: expected a list of names out of {names}")
            unknown = [name for name in out_features if name not in names]
            if unknown or len(set(out_features)) != len(out_features):
                raise ValueError(f"out_features is {list(out_features)}: expected distinct names out of {names}")
            if list(out_features) != sorted(out_features, key=names.index):
                raise ValueError(f"out_features is {list(out_features)}: expected the order of {names}")
        if out_indices is not None:
            positive = [i % len(names) for i in _integers("out_indices", out_indices, -len(names), len(names) - 1)]
            if not positive or positive != sorted(set(positive)):
                raise ValueError(f"out_indices is {list(out_indices)}: expected increasing indices into {names}")
            from_indices = [names[i] for i in positive]
            if out_features is not None and list(out_features) != from_indices:
                raise ValueError(
                    f"out_features {list(out_features)} and out_indices {list(out_indices)} differ: give one of them"
                )
            out_features = from_indices
        chosen = list(out_features) if out_features is not None else names[-1:]
        self.out_features: list[str] = chosen
        self.out_indices: list[int] = [names.index(name) for name in chosen]

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the extra ones, as JSON can hold them; the layout of transformers' ``config.json``."""
        fields = copy.deepcopy(self.extra)
        fields["model_type"] = self.model_type
        for name, value in vars(self).items():
            if name != "extra":
                fields[name] = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
        fields["id2label"] = {str(i): name for i, name in self.id2label.items()}
        fields["stage_names"] = self.stage_names
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ConvNextConfig:
        """The inverse of `to_dict`; a `ConvNextV2Config` where the fields name its ``model_type``.

        Raises:
            TypeError, ValueError: ``fields`` is not a mapping, describes another architecture, or holds an invalid
            value.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"a configuration is a mapping of field names to values, not a {type(fields).__name__}")
        fields = dict(fields)
        if fields.get("id2label") is not None:
            fields.pop("num_labels", None)
        is_v2 = fields.get("model_type") == ConvNextV2Config.model_type
        return (ConvNextV2Config if is_v2 and issubclass(ConvNextV2Config, cls) else cls)(**fields)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` into ``directory``, which is made if it is missing."""
        write_files(local_path(directory), {"config.json": json_writer(self.to_dict())})

    @classmethod
    def from_pretrained(cls, source: str | Path, **overrides: Any) -> ConvNextConfig:
        """Read ``config.json`` of a folder or of a Hugging Face hub id; ``overrides`` replace fields.

        Raises:
            FileNotFoundError: the folder has no ``config.json``.
            TypeError, ValueError: an override is invalid.
            ValueError: the file is no JSON, holds an invalid value, or describes another architecture.
        """
        return cls.from_file(find_file(source, "config.json")).amended(**overrides)

    @classmethod
    def from_file(cls, path: Path) -> ConvNextConfig:
        """Read a file laid out as ``config.json`` is; see `from_pretrained`."""
        fields = read_json(path)
        # Folders of other formats than transformers' keep the configuration apart from what those libraries read.
        fields = fields[SECTION] if isinstance(fields.get(SECTION), dict) else fields
        known = [kind.model_type for kind in (ConvNextConfig, ConvNextV2Config) if issubclass(kind, cls)]
        if fields.get("model_type") not in known:
            expected = " or ".join(map(repr, known))
            raise ValueError(f"{path} describes a model of type {fields.get('model_type')!r}: expected {expected}")
        try:
            return cls.from_dict(fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def amended(self, **fields: Any) -> ConvNextConfig:
        """This configuration with other fields, checked as by the constructor; other ``num_labels`` get new names."""
        entailed = {
            "num_labels": ("id2label", "label2id"),
            "id2label": ("label2id",),
            "out_features": ("out_indices",),
            "out_indices": ("out_features",),
        }
        if isinstance(fields.get("id2label"), Mapping) and fields.get("num_labels") is not None:
            _check_count(fields["num_labels"], fields["id2label"])
        forgotten = {name for field in fields for name in entailed.get(field, ())}
        return type(self).from_dict({k: v for k, v in self.to_dict().items() if k not in forgotten} | fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConvNextConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2, default=str)}"


class ConvNextV2Config(ConvNextConfig):
    """What a ConvNeXt V2 is made of; every field of transformers' ``ConvNextV2Config``, with its defaults.

    Its blocks have a global response norm between the linear layers and no layer scale. The arguments are those of
    `ConvNextConfig`, of which ``layer_scale_init_value`` has no effect, as in transformers.
    """

    model_type = "convnextv2"
    version = 2

    def to_dict(self) -> dict[str, Any]:
        """As `ConvNextConfig.to_dict`, without a layer scale."""
        return {name: value for name, value in super().to_dict().items() if name != "layer_scale_init_value"}


def _check_count(num_labels: int, id2label: Mapping[Any, str]) -> None:
    if len(id2label) != num_labels:
        raise ValueError(
            f"num_labels is {num_labels} but id2label names {len(id2label)} classes: give one or make them agree"
        )


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r:.80}: expected an integer of at least {least}")
    if value < least:
        raise ValueError(f"{name} is {_shown(value)}: expected an integer of at least {least}")
    if value > most:
        raise ValueError(f"{name} is {_shown(value)}: expected an integer of at most {most:,}")
    return int(value)


def _shown(value: Any) -> str:
    """A number in a message; Python refuses to write one of thousands of digits."""
    return str(value) if abs(value) < 1 << 64 else "a number of more than 64 bits"


def _integers(name: str, value: Any, least: int, most: int) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {value!r:.80}: expected a list of integers of at least {least}")
    if len(value) > MOST_STAGES + 1:
        raise ValueError(f"{name} has {len(value):,} values: expected at most {MOST_STAGES + 1}")
    return tuple(_integer(f"{name}[{i}]", item, least, most) for i, item in enumerate(value))


def _size(name: str, value: Any, most: int) -> int | tuple[int, int]:
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        pair = _integers(name, value, 1, most)
        if len(pair) != 2:
            raise ValueError(f"{name} is {value!r}: expected an integer, or two as (height, width)")
        return pair[0], pair[1]
    return _integer(name, value, 1, most)


def _real(name: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    allowed = "a number"
    if least is not None:
        allowed += f" of at least {least}" if most is None else f" in [{least}, {most}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r:.80}: expected {allowed}")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{name} is {_shown(value)}: expected {allowed}") from None
    if not math.isfinite(value) or (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"{name} is {value}: expected {allowed}")
    return value


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} is {value!r}: expected one of {', '.join(allowed)}")
