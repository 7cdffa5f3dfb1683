"""What the transformers-shaped models return: fields by attribute, by key and by index."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class ModelOutput(Mapping):
    """Base of the outputs: a mapping of the fields that are not None, also reachable by index and attribute.

    ``output.logits``, ``output["logits"]`` and ``output[0]`` are the same tensor if ``logits`` is the first field
    present; ``to_tuple()`` gives all fields present. Instead of the first field, the constructor also takes a mapping
    or an iterator of (name, value) pairs of all fields, which is how accelerate and `torch.nn.DataParallel` build
    outputs.
    """

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        first = getattr(self, names[0])
        if not isinstance(first, (Mapping, Iterator)):
            return
        given = dict(first)
        unknown = [name for name in given if name not in names]
        if unknown or any(getattr(self, name) is not None for name in names[1:]):
            raise ValueError(
                f"{type(self).__name__} of the fields {list(given)}: expected some of {names}, and no more"
            )
        for name in names:
            setattr(self, name, given.get(name))

    def keys(self) -> list[str]:  # type: ignore[override]
        """Names of the fields present, in order."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return [name for name in names if getattr(self, name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields present, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{key!r}: this output holds {self.keys()}")
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in [field.name for field in dataclasses.fields(self)]:  # type: ignore[arg-type]
            raise KeyError(f"{key!r}: this output holds {self.keys()}")
        setattr(self, key, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclasses.dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """Of `ConvNextModel`.

    last_hidden_state: (N, C, H, W) of the last stage. pooler_output: (N, C), LayerNorm of its mean over H and W.
    hidden_states: after the stem and after each stage, (N, C, H, W) each; None unless asked for.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclasses.dataclass(eq=False)
class ImageClassifierOutput(ModelOutput):
    """Of `ConvNextForImageClassification`.

    loss: scalar, with labels. logits: (N, num_labels). hidden_states: as in `BaseModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclasses.dataclass(eq=False)
class BackboneOutput(ModelOutput):
    """Of `ConvNextBackbone`.

    feature_maps: (N, C, H, W) of each of ``out_features``. hidden_states: as in `BaseModelOutput`.
    """

    feature_maps: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


for _output in (BaseModelOutput, ImageClassifierOutput, BackboneOutput):
    torch.export.register_dataclass(_output, serialized_type_name=f"convnext_fast.{_output.__name__}")
