"""`SavedProcessor`: an image processor's options as a JSON file, with transformers' methods."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json
from ..huggingface.saved_json import SavedJson
from ..huggingface.virtual_subclass import VirtualSubclass
from .options import DEFAULTS, check_names

TYPES = (
    "ConvNextImageProcessor",
    "ConvNextFeatureExtractor",
    "ConvNextImageProcessorFast",
    "ConvNextImageProcessorPil",
)
"""The classes whose files are read."""


class SavedProcessor(SavedJson, VirtualSubclass):
    """Reads, writes and compares the options, which are attributes; ``extra`` holds other keys of a file."""

    transformers_base = "transformers.image_processing_utils", "BaseImageProcessor"
    file_name = "preprocessor_config.json"
    extra: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All options that are set, except ``device``, and the extra keys, as in ``preprocessor_config.json``."""
        fields = copy.deepcopy(self.extra)
        fields["image_processor_type"] = TYPES[0]
        for name in DEFAULTS:
            value = getattr(self, name)
            if value is not None and name != "device":
                fields[name] = int(value) if name == "resample" else copy.deepcopy(value)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """The inverse of `to_dict`; ``overrides`` replace fields.

        Args:
            fields: of a ``preprocessor_config.json``.
            return_unused_kwargs: return (processor, the ``overrides`` that are not options).
            **overrides: see `ImageOptions`.

        Raises:
            TypeError, ValueError: ``fields`` is not a mapping, is of another processor, or holds an invalid value.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"fields is a {type(fields).__name__}: expected a mapping of option names to values")
        unused = {name: overrides.pop(name) for name in [*overrides] if return_unused_kwargs and name not in DEFAULTS}
        check_names(overrides)
        made = cls(**{**copy.deepcopy(dict(fields)), **overrides})
        return (made, unused) if return_unused_kwargs else made

    @classmethod
    def _check_names(cls, overrides: dict[str, Any], return_unused: bool) -> None:
        if not return_unused:
            check_names(_without_unknown_none(overrides))

    @classmethod
    def _read(cls, source: str | Path, path: Path, overrides: dict[str, Any], return_unused: bool) -> Any:
        overrides = _without_unknown_none(overrides)
        fields = {name: value for name, value in read_json(path).items() if name not in overrides}
        try:
            cls.from_dict(fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        return cls.from_dict(fields, return_unused_kwargs=return_unused, **overrides)


def _without_unknown_none(overrides: dict[str, Any]) -> dict[str, Any]:
    """transformers passes None for options that no caller set."""
    return {name: value for name, value in overrides.items() if value is not None or name in DEFAULTS}
