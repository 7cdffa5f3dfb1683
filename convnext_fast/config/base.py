"""`ConfigBase`: a configuration as a JSON file, with transformers' methods."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..files import read_json
from ..huggingface.saved_json import SavedJson
from ..huggingface.virtual_subclass import VirtualSubclass

if TYPE_CHECKING:
    from typing_extensions import Self

SECTION = "convnext_fast"
"""Key of a ``config.json`` under which folders of other formats than transformers' keep the whole configuration."""


def alias(path: str) -> Any:
    """Another name for an attribute of the object, or of one that it holds."""
    *owner, name = path.split(".")
    holder = operator.attrgetter(*owner) if owner else lambda self: self
    return property(lambda self: getattr(holder(self), name), lambda self, value: setattr(holder(self), name, value))


class ConfigBase(SavedJson, VirtualSubclass):
    """Reads, writes and compares a configuration. Its fields are the arguments of the constructor, and attributes."""

    transformers_base = "transformers.configuration_utils", "PretrainedConfig"
    file_name = "config.json"
    model_type: str
    sub_configs: ClassVar[dict[str, Any]] = {}
    kinds: ClassVar[dict[str, type[ConfigBase]]] = {}
    """The classes by ``model_type``."""
    output_hidden_states, output_attentions, return_dict = False, False, True
    is_encoder_decoder, chunk_size_feed_forward = False, 0
    architectures: list[str] | None = None
    transformers_version: str | None = None
    dtype: torch.dtype | None = None
    torch_dtype = alias("dtype")
    """transformers' older name for it."""
    name_or_path: str = ""
    """Where `from_pretrained` read it; not written."""

    def __init_subclass__(cls, **options: Any) -> None:
        if "model_type" in vars(cls):
            ConfigBase.kinds.setdefault(cls.model_type, cls)  # a user's subclass does not replace ours

    def amended(self, **fields: Any) -> Self:
        """This configuration with other fields, checked as by the constructor."""
        raise NotImplementedError

    def _keep(self, extra: dict[str, Any]) -> None:
        """Keep the constructor's other arguments as attributes."""
        for name in ("stage_names", *_OF_CLASS, *(key for key in vars(self) if key.startswith("_"))):
            extra.pop(name, None)  # follows from the fields, or must not come from a file
        dtype = extra.pop("torch_dtype", None)
        if dtype is not None:
            extra.setdefault("dtype", dtype)
        for name, value in extra.items():
            known = getattr(type(self), name, None)
            if callable(known):
                raise ValueError(f"{name} is a method of a {type(self).__name__}, not a field")
            if known is None and near_fields(type(self), name):
                warnings.warn(f"{unknown_field(type(self), name)} It is kept, and has no effect", stacklevel=4)
            if isinstance(known, property) and known.fset is None:
                vars(self)[name] = value
            else:
                setattr(self, name, value)

    def _own_values(self) -> dict[str, Any]:
        """The attributes that are written: not private ones, nor the defaults of every configuration."""
        usual = vars(ConfigBase)
        public = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "name_or_path"}
        return {k: v for k, v in public.items() if k not in usual or v != usual[k]}

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, without the defaults of every configuration of transformers."""
        usual = type(self)().to_dict()
        return {k: v for k, v in self.to_dict().items() if k not in _COMMON or v != usual[k]}

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Assign several fields."""
        for name, value in config_dict.items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """The inverse of `to_dict`, of the class that ``model_type`` names; ``overrides`` replace fields.

        Args:
            fields: of a ``config.json``.
            return_unused_kwargs: return (configuration, the ``overrides`` that are not fields).
            **overrides: fields, or attributes that ``fields`` holds. Others are ignored.

        Raises:
            TypeError, ValueError: ``fields`` is not a mapping, describes another architecture, or holds an invalid
            value; or an override looks like a misspelt field.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"a configuration is a mapping of field names to values, not a {type(fields).__name__}")
        fields = dict(fields)
        if fields.get("id2label") is not None:
            fields.pop("num_labels", None)
        kind = cls.kinds.get(str(fields.get("model_type")), cls)
        return (kind if issubclass(kind, cls) else cls)(**fields)._with(overrides, return_unused_kwargs)

    def _with(self, overrides: Mapping[str, Any], return_unused: bool) -> Any:
        known = fields_of(type(self)).union(vars(self), dir(type(self)))
        unused = {name: value for name, value in overrides.items() if name not in known}
        misspelt = [name for name, value in unused.items() if value is not None and near_fields(type(self), name)]
        if misspelt and not return_unused:
            raise TypeError("; ".join(unknown_field(type(self), name) for name in misspelt))
        used = {name: value for name, value in overrides.items() if name not in unused}
        config = self.amended(**used) if used else self
        return (config, unused) if return_unused else config

    @classmethod
    def _read(cls, source: str | Path, path: Path, overrides: dict[str, Any], return_unused: bool) -> Any:
        config = cls.from_file(path)
        config.name_or_path = source
        return config._with(overrides, return_unused)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a file like ``config.json``; see `from_pretrained`."""
        fields, where = read_json(path), str(path)
        known = [name for name, kind in cls.kinds.items() if issubclass(kind, cls)] or [cls.model_type]
        model_type = fields.get("model_type")
        if fields.get(SECTION) is not None:
            fields, where = fields[SECTION], f"{path}, {SECTION}"
            model_type = fields.get("model_type", known[0]) if isinstance(fields, dict) else known[0]
        if model_type not in known:
            expected = " or ".join(map(repr, known))
            raise ValueError(f"{where} describes a model of type {model_type!r}: expected {expected}")
        try:
            return cls.from_dict(fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())


_OF_CLASS = ("version", "file_name", "kinds", "sub_configs", "transformers_base")
"""Attributes of the classes, which a file must not overwrite."""
_COMMON = ("id2label", "label2id", "problem_type", "transformers_version")
"""Fields of every configuration of transformers that are written here even with their default values."""


@functools.cache
def fields_of(kind: type[ConfigBase]) -> frozenset[str]:
    """Names of the fields that a configuration describes."""
    return frozenset(inspect.signature(kind).parameters) - {"extra"}


def near_fields(kind: type[ConfigBase], name: str) -> list[str]:
    """The field that ``name`` looks like, if any."""
    return difflib.get_close_matches(name, sorted(fields_of(kind)), n=1, cutoff=0.8)


def unknown_field(kind: type[ConfigBase], name: str) -> str:
    """What an error says of a name that is not a field."""
    near = near_fields(kind, name)
    return f"{name} is not a field of a {kind.__name__}" + (f": is {near[0]} meant?" if near else ".")
