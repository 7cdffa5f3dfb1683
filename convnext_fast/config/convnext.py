"""`ConvNextConfig`: the architecture as data, readable and writable as transformers' ``config.json``."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import checks
from .base import ConfigBase, alias

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "selu")
_ACTIVATION_ALIASES = {"swish": "silu"}

# A file of a few bytes can ask for any size. The largest published model, xxlarge with 21,841 classes, has 40 blocks
# and 0.91 billion parameters.
MOST_CHANNELS, MOST_BLOCKS = 1 << 16, 1 << 10
MOST_SIDE = 1 << 13
"""Of an image, in pixels: the largest square is 0.8 GB in float32."""
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


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "num_channels": functools.partial(checks.integer, least=1, most=MOST_CHANNELS),
    "patch_size": functools.partial(checks.size, most=MOST_SIDE),
    "num_stages": functools.partial(checks.integer, least=1, most=checks.MOST_STAGES),
    "hidden_sizes": functools.partial(checks.integers, least=1, most=MOST_CHANNELS),
    "depths": functools.partial(checks.integers, least=0, most=MOST_BLOCKS),
    "hidden_act": functools.partial(checks.one_of, allowed=(*ACTIVATIONS, *_ACTIVATION_ALIASES)),
    "initializer_range": functools.partial(checks.real, least=0),
    "layer_norm_eps": functools.partial(checks.real, least=0),
    "layer_scale_init_value": checks.real,
    "drop_path_rate": functools.partial(checks.real, least=0, most=1),
    "image_size": functools.partial(checks.size, most=MOST_SIDE),
    "norm_eps": functools.partial(checks.real, least=0),
    "problem_type": lambda name, value: None if value is None else checks.one_of(name, value, PROBLEM_TYPES),
    "label2id": checks.mapping,
    "output_hidden_states": checks.states,
    "dtype": checks.floating,
    "name_or_path": lambda name, value: str(value),
}
"""The check of each field, made when it is assigned."""


class ConvNextConfig(ConfigBase):
    """The architecture of a ConvNeXt: every field of transformers' ``ConvNextConfig``, with its defaults.

    ConvNeXt V2 has `ConvNextV2Config`.

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
        **extra: any other key of a ``config.json``; an attribute, written back. A warning names a likely misspelling.

    Every field may be assigned, and is checked then. ``num_labels``, ``id2label`` and ``label2id`` follow one another,
    and so do ``out_features`` and ``out_indices``.

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
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.num_stages = num_stages
        self.hidden_sizes = (96, 192, 384, 768) if hidden_sizes is None else hidden_sizes
        self.depths = (3, 3, 9, 3) if depths is None else depths
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.layer_scale_init_value = layer_scale_init_value
        self.drop_path_rate = drop_path_rate
        self.image_size = image_size
        self.norm_eps = norm_eps
        self.problem_type = problem_type
        if id2label is None:
            self.id2label = _new_labels(2 if num_labels is None else num_labels)
        else:
            self.id2label = id2label
            if num_labels is not None:
                _check_count(checks.integer("num_labels", num_labels, 0, checks.MOST_LABELS), self.id2label)
        if label2id is not None:
            self.label2id = label2id
        self._out_features = self._outputs(out_features, out_indices)
        self._keep(extra)
        self.validate()
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("problem_type is 'single_label_classification' with num_labels=1: expected 'regression'")

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        super().__setattr__(name, value if check is None else check(name, value))

    def validate(self) -> None:
        """Raise a ValueError where fields contradict each other."""
        for name in ("hidden_sizes", "depths"):
            value = getattr(self, name)
            if len(value) != self.num_stages:
                raise ValueError(
                    f"{name} is {value}, {len(value)} values: expected one for each of num_stages={self.num_stages}"
                )
        if sum(self.depths) > MOST_BLOCKS:
            raise ValueError(f"depths is {self.depths}: expected at most {MOST_BLOCKS:,} blocks in all")
        self._outputs(self._out_features, None)
        self._check_parameters()

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
        return checks.pair(self.patch_size)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the images the model was trained on."""
        return checks.pair(self.image_size)

    @property
    def num_labels(self) -> int:
        """Number of classes; another number gives them new names."""
        return len(self._id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if count != len(self._id2label):
            self.id2label = _new_labels(count)

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by index; assigning them also sets ``label2id``."""
        return self._id2label

    @id2label.setter
    def id2label(self, names: Mapping[int | str, str]) -> None:
        self._id2label = checks.labels("id2label", names)
        self.label2id = {name: i for i, name in self._id2label.items()}

    @property
    def out_features(self) -> list[str]:
        """Names of the feature maps that a backbone returns; assign None for the last."""
        return self.stage_names[-1:] if self._out_features is None else self._out_features

    @out_features.setter
    def out_features(self, names: Sequence[str] | None) -> None:
        self._out_features = self._outputs(names, None)

    @property
    def out_indices(self) -> list[int]:
        """Indices of the feature maps that a backbone returns; assign None for the last."""
        return list(map(self.stage_names.index, self.out_features))

    @out_indices.setter
    def out_indices(self, indices: Sequence[int] | None) -> None:
        self._out_features = self._outputs(None, indices)

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps: "stem", "stage1", …"""
        return ["stem", *(f"stage{i + 1}" for i in range(self.num_stages))]

    @stage_names.setter
    def stage_names(self, names: Sequence[str]) -> None:
        if list(names) != self.stage_names:
            raise ValueError(f"stage_names is {list(names)}: expected {self.stage_names}, which follow from num_stages")

    num_hidden_layers = alias("num_stages")
    """transformers' other name for it."""

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

    def _outputs(self, out_features: Sequence[str] | None, out_indices: Sequence[int] | None) -> list[str] | None:
        """Names of the feature maps to return, from either; None if neither is given."""
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
            positive = [
                i % len(names) for i in checks.integers("out_indices", out_indices, -len(names), len(names) - 1)
            ]
            if not positive or positive != sorted(set(positive)):
                raise ValueError(f"out_indices is {list(out_indices)}: expected increasing indices into {names}")
            from_indices = [names[i] for i in positive]
            if out_features is not None and list(out_features) != from_indices:
                raise ValueError(
                    f"out_features {list(out_features)} and out_indices {list(out_indices)} differ: give one of them"
                )
            out_features = from_indices
        return None if out_features is None else list(out_features)

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the extra ones, as JSON can hold them; the layout of transformers' ``config.json``."""
        fields = self._own_values()
        fields |= {name: getattr(self, name) for name in ("model_type", "out_features", "out_indices", "stage_names")}
        fields["id2label"] = {str(i): name for i, name in self.id2label.items()}
        if self.dtype is not None:
            fields["dtype"] = str(self.dtype).removeprefix("torch.")
        fields.setdefault("transformers_version", None)  # transformers' composite models pop it
        return {k: list(v) if isinstance(v, tuple) else copy.deepcopy(v) for k, v in fields.items()}

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
        kept = self.to_dict() | {"name_or_path": self.name_or_path}
        return type(self).from_dict({k: v for k, v in kept.items() if k not in forgotten} | fields)


class ConvNextV2Config(ConvNextConfig):
    """The architecture of a ConvNeXt V2: every field of transformers' ``ConvNextV2Config``, with its defaults.

    Its blocks have a global response norm between the linear layers and no layer scale. The arguments are those of
    `ConvNextConfig`; ``layer_scale_init_value`` has no effect, as in transformers.
    """

    model_type = "convnextv2"
    version = 2

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, 0.0 if name == "layer_scale_init_value" else value)

    def to_dict(self) -> dict[str, Any]:
        """As `ConvNextConfig.to_dict`, without a layer scale."""
        return {name: value for name, value in super().to_dict().items() if name != "layer_scale_init_value"}


def _check_count(num_labels: int, id2label: Mapping[Any, str]) -> None:
    if len(id2label) != num_labels:
        raise ValueError(
            f"num_labels is {num_labels} but id2label names {len(id2label)} classes: give one or make them agree"
        )


def _new_labels(count: Any) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(checks.integer("num_labels", count, 0, checks.MOST_LABELS))}
