"""What the models with transformers' names return: ordered dictionaries whose entries are also attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree

from ..huggingface.virtual_subclass import VirtualSubclass


class ModelOutput(VirtualSubclass, dict[str, Any]):
    """Base of the outputs: a dictionary of the fields that are not None, also reachable by index and attribute.

    ``output.logits``, ``output["logits"]`` and ``output[0]`` are the same tensor if ``logits`` is the first field
    present; ``to_tuple()`` gives all fields present. Instead of the first field, the constructor also takes a mapping
    or an iterator of (name, value) pairs of all fields, which is how accelerate and `torch.nn.DataParallel` build
    outputs.
    """

    transformers_base = "transformers.utils.generic", "ModelOutput"
    names: ClassVar[tuple[str, ...]]

    def __init__(self, *values: Any, **fields: Any):
        names = type(self).names
        if len(values) == 1 and isinstance(values[0], (Mapping, Iterator)):
            fields = {**dict(values[0]), **fields}
        elif values:
            fields = {**dict(zip(names, values, strict=False)), **fields}
        if len(values) > len(names) or any(name not in names for name in fields):
            raise ValueError(f"{type(self).__name__} of the fields {list(fields)}: expected some of {list(names)}")
        super().__init__()
        for name in names:
            if fields.get(name) is not None:
                self[name] = fields[name]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields present, in order."""
        return tuple(self.values())

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{key!r}: this output holds {list(self)}")
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in type(self).names:
            raise KeyError(f"{key!r}: this output holds {list(self)}")
        super().__setitem__(key, value)

    def __getattr__(self, name: str) -> Any:
        if name in type(self).names:
            return dict.get(self, name)
        raise AttributeError(f"a {type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None:
            dict.pop(self, name, None)
        else:
            self[name] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (dict(self),)

    def __init_subclass__(cls, **options: Any) -> None:
        if "__annotations__" not in vars(cls):
            return
        cls.names = tuple(cls.__annotations__)
        cls.get = dict.get  # torch.jit.trace would compile a class whose methods are all written in Python
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(zip(names, values, strict=True)),
            serialized_type_name=f"convnext_fast.{cls.__name__}",
            flatten_with_keys_fn=lambda output: ([(pytree.MappingKey(k), v) for k, v in output.items()], list(output)),
        )


class BaseModelOutput(ModelOutput):
    """Output of `ConvNextModel`.

    last_hidden_state: (N, C, H, W) of the last stage. pooler_output: (N, C), LayerNorm of its mean over H and W.
    hidden_states: after the stem and after each stage, (N, C, H, W) each; None unless requested.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None


class ImageClassifierOutput(ModelOutput):
    """Output of `ConvNextForImageClassification`.

    loss: scalar, with labels. logits: (N, num_labels). hidden_states: as in `BaseModelOutput`.
    """

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None


class BackboneOutput(ModelOutput):
    """Output of `ConvNextBackbone`.

    feature_maps: (N, C, H, W) of each of ``out_features``. hidden_states: as in `BaseModelOutput`. attentions: None.
    """

    feature_maps: tuple[Tensor, ...]
    hidden_states: tuple[Tensor, ...] | None
    attentions: None
