"""`SavedJson`: an object that a JSON file in a folder or in a Hugging Face hub repository describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from ..files import json_text, json_writer, local_path, read_json, write_files
from .hub import find_file, push, split_loading


class SavedJson:
    """Mix-in: reads, writes, uploads, compares and shows what `to_dict` returns."""

    file_name: ClassVar[str]

    def validate(self) -> None:
        """Raise a ValueError where the object must not be written."""

    def to_dict(self) -> dict[str, Any]:
        """What is written."""
        raise NotImplementedError

    def to_diff_dict(self) -> dict[str, Any]:
        """What `to_json_string` writes by default."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_diff_dict`, or else `to_dict`, as JSON."""
        fields = self.to_diff_dict() if use_diff else self.to_dict()
        return json_text(fields, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write `to_json_string` into a file."""
        path, text = local_path(json_file_path), self.to_json_string(use_diff)
        write_files(path.parent, {path.name: lambda place: place.write_text(text, encoding="utf-8")})

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Any:
        """The inverse of `to_json_file`."""
        return cls.from_dict(read_json(local_path(json_file)))  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, return_unused_kwargs: bool = False, **options: Any
    ) -> Any:
        """Read ``file_name`` of a folder or of a Hugging Face hub id.

        Args:
            pretrained_model_name_or_path: folder, hub id or file.
            return_unused_kwargs: see ``from_dict``.
            **options: those of `hub.Loading`, which say where to look; and fields, to replace those read.

        Raises:
            FileNotFoundError: neither a folder nor a reachable hub repository with that file.
            ImportError: it is a hub id, and the extra ``convnext-fast[hub]`` is not installed.
            TypeError: it is not a path, or an option is unknown.
            ValueError: the file is not a JSON object, describes something else, or holds an invalid value.
        """
        loading, overrides = split_loading(options)
        cls._check_names(overrides, return_unused_kwargs)
        path = local_path(pretrained_model_name_or_path)
        if not path.is_file():
            path = find_file(pretrained_model_name_or_path, cls.file_name, loading=loading)
        return cls._read(pretrained_model_name_or_path, path, overrides, return_unused_kwargs)

    @classmethod
    def _check_names(cls, overrides: dict[str, Any], return_unused: bool) -> None:
        """Raise TypeError for unknown names, before anything is looked for."""

    @classmethod
    def _read(cls, source: str | Path, path: Path, overrides: dict[str, Any], return_unused: bool) -> Any:
        """The object in the file ``path`` of ``source``, with other fields; see `from_pretrained`."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> list[str]:
        """Write ``file_name`` into a folder, which is made if it is missing, and return its path.

        Args:
            save_directory: the folder.
            push_to_hub: then also `push_to_hub`, with **options; ``repo_id`` is the folder's name unless given.

        Raises:
            ValueError: the folder is a file, or fields contradict each other.
        """
        directory = local_path(save_directory)
        if directory.is_file():
            raise ValueError(f"directory {directory} is a file: expected a folder to write {self.file_name} into")
        self.validate()
        write_files(directory, {self.file_name: json_writer(self.to_dict())})
        if push_to_hub:
            self.push_to_hub(**{"repo_id": directory.name, **options})
        return [str(directory / self.file_name)]

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload ``file_name`` to a Hugging Face hub repository; see `hub.push`."""
        return push(self.save_pretrained, repo_id, **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SavedJson) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2, default=str)}"
