"""The rows of a study in one JSON file. Each added row rewrites the file, completely or not at all."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

FILE = "results.json"
SCHEMA = 1
# Facts that all rows of one file must share.
SAME = ("device", "torch", "threads", "cuda", "rocm")


class Results:
    """Rows of results, each a dict with a unique "key" and what `environment.facts` says.

    Args:
        folder: where `FILE` is or will be.
        facts: the facts of this run, which are added to every new row.

    Raises:
        ValueError: the folder holds results of another device or another PyTorch, or no results of this program.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder, self.facts = folder, facts
        self.rows = read(folder) if (folder / FILE).exists() else []
        for row in self.rows:
            for name in SAME:
                if row.get(name) != facts.get(name):
                    raise ValueError(
                        f"{folder / FILE} holds results of {name} {row.get(name)}, this run is of {facts.get(name)}: "
                        "choose another folder with --output"
                    )

    def __contains__(self, key: str) -> bool:
        return any(row["key"] == key for row in self.rows)

    def add(self, *rows: dict[str, Any]) -> None:
        """Append rows, replacing those with the same keys, and write the file."""
        keys = {row["key"] for row in rows}
        self.rows = [row for row in self.rows if row["key"] not in keys] + [row | self.facts for row in rows]
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"schema": SCHEMA, "rows": self.rows}, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.folder / FILE, text)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, even after this process is killed, finds either the old or the new text."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows in a folder.

    Raises:
        ValueError: the file is not what `Results` writes.
        FileNotFoundError: there is none.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"{path} has schema {content['schema']}: expected {SCHEMA}")
        return content["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of results: {error}") from error


def slug(text: str) -> str:
    """A name for a folder: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
