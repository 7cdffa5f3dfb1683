"""Files: paths, JSON, and atomic writes."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MOST_JSON_BYTES = 1 << 26
"""Largest JSON file that is read; a configuration with 20,000 classes takes one megabyte."""
MOST_JSON_LEVELS = 64


def local_path(source: str | Path) -> Path:
    """The path that ``source``, a string or a path, names; ``~`` stands for the home folder."""
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source is a {type(source).__name__}: expected a path or a Hugging Face hub id")
    if not str(source):
        raise ValueError("the path is empty: expected the name of a file or a folder")
    try:
        return Path(source).expanduser()
    except RuntimeError:  # no user has that name: a file's name may begin with ~ too
        return Path(source)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a ValueError if it is something else, or larger than ``MOST_JSON_BYTES``."""
    with open(path, "rb") as file:
        content = file.read(MOST_JSON_BYTES + 1)
    if len(content) > MOST_JSON_BYTES:
        raise ValueError(f"{path} is too large: expected at most {MOST_JSON_BYTES:,} bytes of JSON")
    try:
        fields = json.loads(content.decode())
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # bad UTF-8, bad JSON, or a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if _nests_deeply(fields):
        raise ValueError(f"{path} is nested too deeply: expected at most {MOST_JSON_LEVELS} levels")
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a JSON {type(fields).__name__}: expected an object")
    return fields


def _nests_deeply(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_JSON_LEVELS):
        nested = [each for each in level if isinstance(each, (dict, list))]
        level = [item for each in nested for item in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True


def write_files(directory: Path, writers: Mapping[str, Callable[[Path], None]], stale: Iterable[str] = ()) -> None:
    """Write files into a folder, each atomically, then remove ``stale`` ones.

    All are first written and synchronised to disk under temporary names in that folder, then renamed in the order
    given. A write that fails raises an OSError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    temporary = {name: directory / f".{name}.{secrets.token_hex(4)}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            try:
                _create(temporary[name], write)
            except (RuntimeError, SafetensorError) as error:  # what torch.save and safetensors raise
                if type(error) not in (RuntimeError, SafetensorError):
                    raise
                raise OSError(f"cannot write {directory / name}, is the disk full? ({error})") from error
        for name, path in temporary.items():
            os.replace(path, directory / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for name in stale:
        (directory / name).unlink(missing_ok=True)
    if os.name == "posix":  # other systems cannot open a folder
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def json_text(fields: Mapping[str, Any], **options: Any) -> str:
    """A JSON object; NaN and infinities, which JSON cannot express, become null."""
    return json.dumps(_finite(fields), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def json_writer(fields: Mapping[str, Any]) -> Callable[[Path], None]:
    """A writer of a JSON object, for `write_files`; see `json_text`."""
    text = json_text(fields, indent=2, sort_keys=True) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def _create(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a new file, with the permissions of any new file, and wait until it is on disk."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = path.stat().st_mode
    write(path)
    path.chmod(mode)  # safetensors makes its files private
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
