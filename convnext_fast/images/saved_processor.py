"""`SavedProcessor`: an image processor's options as a JSON file, with transformers' methods."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import local_path, read_json
from ..huggingface.hub import find_file, split_loading
from ..huggingface.saved_json import SavedJson
from ..huggingface.virtual_subclass import VirtualSubclass
from .options import DEFAULTS, check_names

TYPES = (
    "ConvNextImageProcessor",
    "ConvNextFeatureExtractor",
    "ConvNextImageProcessorFast",
    "ConvNextImageProcessorPil",
)
"""Classes whose files are read."""


class SavedProcessor(SavedJson, VirtualSubclass):
    """Reads, writes and compares the options, which are attributes; ``extra`` holds other keys of a file."""

    transformers_base = "transformers.image_processing_utils", "BaseImageProcessor"
    file_name = "preprocessor_config.json"
    extra: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All options that are set but ``device``, with the extra keys, as ``preprocessor_config.json`` holds them."""
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
            return_unused_kwargs: give out (processor, those of ``overrides`` that are no options).
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
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, return_unused_kwargs: bool = False, **options: Any
    ) -> Any:
        """Read ``preprocessor_config.json`` of a folder or of a Hugging Face hub id.

        Args:
            pretrained_model_name_or_path: folder, hub id or file.
            return_unused_kwargs: see `from_dict`.
            **options: those of `hub.Loading`, which say where to look; and of `ImageOptions`, to replace those read.

        Raises:
            FileNotFoundError: neither a folder nor a reachable hub repository with that file.
            ImportError: it is a hub id, and the extra ``convnext-fast[hub]`` is not installed.
            TypeError: it is not a path, or an override is not an option.
            ValueError: the file is not a JSON object, is of another processor, or holds an invalid value.
        """
        loading, overrides = split_loading(options)
        overrides = {name: value for name, value in overrides.items() if value is not None or name in DEFAULTS}
        if not return_unused_kwargs:
            check_names(overrides)
        path = local_path(pretrained_model_name_or_path)
        if not path.is_file():
            path = find_file(pretrained_model_name_or_path, cls.file_name, loading=loading)
        fields = {name: value for name, value in read_json(path).items() if name not in overrides}
        try:
            cls.from_dict(fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        return cls.from_dict(fields, return_unused_kwargs=return_unused_kwargs, **overrides)
