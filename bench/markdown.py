"""Helpers for reports in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    head = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join(head + [f"| {' | '.join(cells)} |" for cells in lines])


def number(value: float | None, pattern: str = "{:.1f}") -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else pattern.format(value)


def of(rows: Iterable[Row], section: str) -> list[Row]:
    """The rows of a section."""
    return [row for row in rows if row["section"] == section]
