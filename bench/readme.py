"""The tables of results in README.md and bench/README.md, made from committed results."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.environment import ROOT
from bench.results import read, write_whole

_SECTION = re.compile(r"<!-- results: (.*?) -->\n.*?<!-- end -->", re.S)
_COLUMNS = "ConvNeXt", "fastest peer, ms", "ours, ms", "times as fast"
Row = dict[str, Any]


def update(folders: Sequence[Path], root: Path = ROOT) -> None:
    """Rewrite the text between ``<!-- results: FOLDERS -->`` and ``<!-- end -->`` in each of `PAGES`.

    Raises:
        ValueError: a page has no such marks, or a folder is not below ``root``.
    """
    if outside := [folder for folder in folders if not folder.resolve().is_relative_to(root.resolve())]:
        raise ValueError(f"{outside[0]} is not below {root}: expected committed results")
    for path, text in [(root / page, rewritten(root / page, folders, make)) for page, make in PAGES.items()]:
        write_whole(path, text)


def rewritten(path: Path, folders: Sequence[Path], make: Callable[[Sequence[Path], Path], str]) -> str:
    """The text of the page at ``path`` with a new section of results, which ``make`` makes from the folders.

    Raises:
        ValueError: the page does not have exactly one such section.
    """
    text = path.read_text(encoding="utf-8")
    if len(_SECTION.findall(text)) != 1:
        raise ValueError(f"{path} has no single <!-- results: … --> with an <!-- end --> after it")
    names = " ".join(_link(folder, path.parent) for folder in folders)
    section = f"<!-- results: {names} -->\n{make(folders, path.parent)}\n<!-- end -->"
    return _SECTION.sub(lambda _: section, text)


def named_in(path: Path) -> list[Path]:
    """The folders of results that the page at ``path`` names.

    Raises:
        ValueError: it has no section of results.
    """
    found = _SECTION.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path} has no <!-- results: … --> section")
    return [path.parent / name for name in found[1].split()]


def overview(folders: Sequence[Path], base: Path) -> str:
    """One table of all folders: our best beside the best peer, and the device."""
    found = ((_device(rows[0]), line) for rows in map(read, folders) for line in _lines(rows))
    return report.table(_COLUMNS, [(f"{device}: {what}", *rest) for device, (what, *rest) in found])


def details(folders: Sequence[Path], base: Path) -> str:
    """For each folder: what it ran on, the table, a link to all rows, and the checks of correctness."""
    return "\n\n".join(_details(_link(folder, base), read(folder)) for folder in folders)


PAGES: dict[str, Callable[[Sequence[Path], Path], str]] = {"README.md": overview, "bench/README.md": details}
"""The pages with a section of results, and the function that writes it."""


def _link(folder: Path, base: Path) -> str:
    return Path(os.path.relpath(folder.resolve(), base.resolve())).as_posix()


def _device(row: Row) -> str:
    return row["device"] + (f", {row['threads']} threads" if "threads" in row else "")


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, str]]:
    """What was measured, the fastest peer, our fastest, and how many times as fast ours is."""
    for cell in report.cells([row for row in rows if row["section"] == "models"]).values():
        row, peer, own = cell[0], report.best_peer(cell), report.best_own(cell)
        what = f"{row['variant']}, {row['side']}², {row['mode']}, batch {row['batch']}, {row['dtype']}"
        if peer is not None and own is not None:
            yield what, _time(peer), _time(own), f"{peer['p50_ms'] / own['p50_ms']:.2f}"
        elif any(each["failure"] and not each["failure"].startswith("not run") for each in cell):
            yield what, _time(peer), _time(own), "–"


def _details(name: str, rows: Sequence[Row]) -> str:
    found = [
        f"{report.versions(rows)}. [All rows]({name}/{report.FILE}).",
        report.table(_COLUMNS, list(_lines(rows))),
    ]
    checks = [row for row in rows if row["section"] == "correctness" and row["passed"] is not None]
    if checks:
        found.append(f"{sum(row['passed'] for row in checks)} of {len(checks)} correctness checks passed.")
    return "\n\n".join(found)


def _time(row: Row | None) -> str:
    return "–" if row is None else f"{row['p50_ms']:.{2 if row['p50_ms'] < 10 else 1}f} ({row['contender']})"
