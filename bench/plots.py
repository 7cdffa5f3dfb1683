"""The plots of a study: throughput against batch, time of each stage against the roofline, memory, speed-up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.variants import RECIPES, is_ours

Row = dict[str, Any]
# Colours that colour-blind readers can tell apart (Okabe and Ito); ours are the warm ones.
_PEERS = ("#999999", "#000000", "#0072B2", "#56B4E9", "#009E73", "#7F7FBF", "#5D3A9B", "#1A6B3C")
_PANELS_ACROSS = 3
_OURS = ("#D55E00", "#E69F00", "#CC79A7", "#F0E442", "#B22222", "#8B4513", "#FF9DA7")


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Draw what the rows allow, as PNG files in the folder; returns their names.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install -e '.[bench]'") from error

    timed = [row for row in rows if not row["failure"] and "p50_ms" in row]
    models = [row for row in timed if row["section"] == "models"]
    stages = [row for row in timed if row["section"] == "stages"]
    drawn = []
    figures = (
        ("throughput.png", models, _throughput),
        ("memory.png", models, _memory),
        ("speedup.png", models, _speedup),
        ("stages.png", stages, _stages),
    )
    for name, chosen, plot in figures:
        if not chosen:
            continue
        groups = _groups(chosen)
        across = min(len(groups), _PANELS_ACROSS)
        down = -(-len(groups) // across)
        figure = Figure(figsize=(5.5 * across, 4.2 * down), layout="constrained")
        FigureCanvasAgg(figure)
        for i, (title, group) in enumerate(groups.items()):
            axes = figure.add_subplot(down, across, i + 1)
            plot(axes, group)
            axes.set_title(title, fontsize=10)
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})
        drawn.append(name)
    return drawn


def _groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by panel: variant, mode and dtype; for stages, mode and dtype."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        words = [row[name] for name in ("variant", "mode", "dtype") if name in row]
        found.setdefault(", ".join(words), []).append(row)
    return found


def _colour(name: str) -> str:
    ours = is_ours(name)
    names = [each for each in RECIPES if is_ours(each) == ours]
    colours = _OURS if ours else _PEERS
    return colours[names.index(name) % len(colours)]


def _by_contender(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["contender"], []).append(row)
    return found


def _lines(axes: Any, rows: list[Row], value: str, label: str) -> None:
    for name, group in _by_contender(rows).items():
        points = sorted((row["batch"], row[value]) for row in group if row[value] is not None)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, color=_colour(name))
    batches = sorted({row["batch"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(n) for n in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel(label)
    axes.legend(fontsize=7)


def _throughput(axes: Any, rows: list[Row]) -> None:
    _lines(axes, rows, "images_per_s", "images/s")
    axes.set_ylim(0, 1.05 * max(row["images_per_s"] for row in rows))


def _memory(axes: Any, rows: list[Row]) -> None:
    _lines(axes, rows, "peak_mib", "peak MiB")
    axes.set_yscale("log")


def _speedup(axes: Any, rows: list[Row]) -> None:
    """Each contender's speed divided by eager's, at every batch."""
    batches = sorted({row["batch"] for row in rows})
    names = list(_by_contender(rows))
    width = 0.8 / len(names)
    eager = {row["batch"]: row["p50_ms"] for row in rows if row["contender"] == "eager"}
    for i, name in enumerate(names):
        times = {row["batch"]: row["p50_ms"] for row in rows if row["contender"] == name}
        bars = [(j + i * width, eager[n] / times[n]) for j, n in enumerate(batches) if n in times and n in eager]
        if bars:
            axes.bar(*zip(*bars, strict=True), width, label=name, color=_colour(name))
    axes.axhline(1.0, color="black", linewidth=0.7)
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(batches))], [f"batch {n}" for n in batches])
    axes.set_ylabel("times as fast as eager")
    axes.legend(fontsize=7)


def _stages(axes: Any, rows: list[Row]) -> None:
    """Bars for the contenders of each stage's block, and the roofline's time as a line across them."""
    shapes = sorted({tuple(row["shape"]) for row in rows}, key=lambda shape: shape[3])
    names = list(_by_contender(rows))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        times = {tuple(row["shape"]): row["p50_ms"] for row in rows if row["contender"] == name}
        bars = [(j + i * width, times[shape]) for j, shape in enumerate(shapes) if shape in times]
        axes.bar(*zip(*bars, strict=True), width, label=name, color=_colour(name))
    for j, shape in enumerate(shapes):
        row = next(row for row in rows if tuple(row["shape"]) == shape)
        least = row["p50_ms"] * row["of_roofline"]
        axes.hlines(least, j - width / 2, j + 0.8 - width / 2, color="red", label=None if j else "roofline")
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(shapes))], [f"{h}²×{c}" for _, h, _, c in shapes])
    axes.set_ylabel("ms a block")
    axes.legend(fontsize=7)
