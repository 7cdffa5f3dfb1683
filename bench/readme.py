"""README's performance section, made of committed results."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.environment import ROOT
from bench.results import read, write_whole

README = ROOT / "README.md"
_SECTION = re.compile(r"<!-- performance: (.*?) -->\n.*?<!-- end -->", re.S)


def update(folders: Sequence[Path], path: Path = README) -> None:
    """Replace what stands between ``<!-- performance: FOLDERS -->`` and ``<!-- end -->`` in the README.

    Raises:
        ValueError: the README has no such marks, or a folder is not below it.
    """
    text = path.read_text(encoding="utf-8")
    if len(_SECTION.findall(text)) != 1:
        raise ValueError(f"{path} has no single <!-- performance: … --> with an <!-- end --> after it")
    names = [os.path.relpath(folder.resolve(), path.parent.resolve()) for folder in folders]
    if outside := [name for name in names if name.startswith("..")]:
        raise ValueError(f"{outside[0]} is not below {path.parent}: the README can only show committed results")
    made = f"<!-- performance: {' '.join(names)} -->\n{section(names, path.parent)}\n<!-- end -->"
    write_whole(path, _SECTION.sub(lambda _: made, text))


def stated(path: Path = README) -> tuple[list[str], str]:
    """The folders that the README names, and its section as it stands.

    Raises:
        ValueError: the README has no such section.
    """
    found = _SECTION.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path} has no <!-- performance: … --> section")
    body = found[0].split("-->\n", 1)[1].removesuffix("\n<!-- end -->")
    return found[1].split(), body


def section(names: Sequence[str], root: Path = ROOT) -> str:
    """The section: for each folder what it ran on, and a table of our best against the best peer."""
    return "\n\n".join(_device(name, read(root / name)) for name in names)


def _device(name: str, rows: list[dict[str, Any]]) -> str:
    models = [row for row in rows if row["section"] == "models"]
    lines = []
    for cell in report.cells(models).values():
        row, peer, own = cell[0], report.best_peer(cell), report.best_own(cell)
        what = f"{row['variant']}, {row['mode']}, batch {row['batch']}, {row['dtype']}"
        if peer is None or own is None:
            if any(each["failure"] and not each["failure"].startswith("not run") for each in cell):
                lines.append((what, _cell(peer), _cell(own), "–"))
            continue
        lines.append((what, _cell(peer), _cell(own), f"{peer['p50_ms'] / own['p50_ms']:.2f}"))
    columns = (f"ConvNeXt, {models[0]['side']}²" if models else "", "fastest peer, ms", "ours, ms", "times as fast")
    found = [
        f"Measured: {report.versions(rows)}. Medians; peers are eager PyTorch in both layouts, torch.compile and, for "
        f"inference on a CPU, ONNX Runtime and OpenVINO; outputs and gradients checked first. "
        f"[All rows]({name}/{report.FILE}).",
        report.table(columns, lines),
    ]
    checks = [row for row in rows if row["section"] == "correctness" and row["passed"] is not None]
    if checks:
        found.append(f"{sum(row['passed'] for row in checks)} of {len(checks)} correctness checks passed on it.")
    return "\n\n".join(found)


def _cell(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['p50_ms']:.{2 if row['p50_ms'] < 10 else 1}f} ({row['contender']})"
