"""`SavedJson`: an object that a JSON file in a folder or in a Hugging Face hub repository describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from ..files import json_text, json_writer, local_path, read_json, write_files
from .hub import push


class SavedJson:
    """Mix-in: writes, uploads, compares and shows what `to_dict` gives."""

    file_name: ClassVar[str]

    def validate(self) -> None:
        """Raise a ValueError where the object must not be written."""

    def to_dict(self) -> dict[str, Any]:
        """What is written."""
        raise NotImplementedError

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json_text(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write `to_json_string` into a file."""
        save_text(json_file_path, self.to_json_string())

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Any:
        """The inverse of `to_json_file`."""
        return cls.from_dict(read_json(local_path(json_file)))  # type: ignore[attr-defined]

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


def save_text(file: str | Path, text: str) -> None:
    """Write a text file atomically."""
    path = local_path(file)
    write_files(path.parent, {path.name: lambda place: place.write_text(text, encoding="utf-8")})
