"""The sections that `bench.gpu_day` adds to a report: steps, the chip's rates, kernel times, the host, counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.markdown import number, of, table

Row = dict[str, Any]
COUNTERS = (
    "Duration",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "L1/TEX Cache Throughput",
    "Compute (SM) Throughput",
    "Issue Slots Busy",
    "Achieved Occupancy",
    "L2 Hit Rate",
)
"""The metrics of ncu that the report shows; the results hold all."""


def sections(rows: Sequence[Row]) -> list[str]:
    """The sections that have rows."""
    return [
        _steps(of(rows, "steps")),
        _chip(of(rows, "chip")),
        *_kernels(of(rows, "kernels"), of(rows, "modelled")),
        _host(of(rows, "host")),
        _variants(of(rows, "variants")),
        _counters(of(rows, "counters")),
    ]


def _steps(rows: list[Row]) -> str:
    lines = [(row["step"], row["failure"] or "done", f"{row['took_s']:.0f}") for row in rows]
    return "## Steps\n\n" + table(("step", "", "s"), lines) if rows else ""


def _chip(rows: list[Row]) -> str:
    if not rows:
        return ""
    row = rows[0]
    return (
        f"Copying 1 GiB: {row['copy_bytes_s'] / 1e12:.2f} TB/s. Reading 16 MiB of the L2 cache by every program: "
        f"{row['l2_read_bytes_s'] / 1e12:.2f} TB/s. A launch takes the host {1e6 * row['launch_s']:.1f} µs, and in a "
        f"CUDA graph the device {1e6 * row['launch_in_graph_s']:.1f} µs."
    )


def _kernels(rows: list[Row], modelled: list[Row]) -> list[str]:
    if not rows:
        return []
    found = [
        "## Each kernel in a CUDA graph",
        "Measured by PyTorch's profiler in replays. Limit and modelled time: see the section on what is modelled. "
        "Bound: what the model holds for the longest.",
    ]
    models = {row["pass"]: row for row in modelled if not row["failure"] and "kinds" in row}
    for row in rows:
        if row["failure"]:
            found.append(f"### {row['pass']}\n\n{row['failure']}")
            continue
        head = f"### {row['pass']}: {row['p50_ms']:.2f} ms, of which kernels {row['kernels_us'] / 1e3:.2f} ms"
        found.append(head + "\n\n" + _kernel_table(row["kernels"], models.get(row["pass"])))
    return found


def _kernel_table(measured: list[tuple[str, float]], model: Row | None) -> str:
    """A table, longest first: kernels that the model knows by kind of launch, the others by name."""
    columns = ("kernel", "shape", "×", "measured µs", "modelled µs", "limit µs", "bound")
    others: dict[str, list[float]] = {}
    lines: list[tuple[float, tuple[str, ...]]] = []
    kinds = [] if model is None else [kind for kind in model["kinds"] if kind["programs"]]
    names = {kind["kernel"] for kind in kinds}
    ours = [each for each in measured if each[0] in names]
    order = sorted((place, kind["kernel"]) for kind in kinds for place in kind["places"])
    fits = [name for name, _ in ours] == [name for _, name in order]
    if fits:
        times = {place: time for (place, _), (_, time) in zip(order, ours, strict=True)}
        for kind in kinds:
            total = sum(times[place] for place in kind["places"])
            count = len(kind["places"])
            bound = max(kind["bounds"], key=lambda name, bounds=kind["bounds"]: bounds[name])
            figures = (f"{total / count:.1f}", f"{kind['microseconds']:.1f}", f"{kind['limit']:.1f}", bound)
            lines.append((total, (kind["kernel"], kind["shape"], str(count), *figures)))
    for name, time in measured:
        if not fits or name not in names:
            others.setdefault(name, []).append(time)
    for name, each in others.items():
        lines.append((sum(each), (name[:60], "", str(len(each)), f"{sum(each) / len(each):.1f}", "", "", "")))
    lines.sort(key=lambda line: -line[0])
    note = "" if fits or not kinds else "\n\nThe launches are not those that the model recorded, so they stand alone."
    return table(columns, [line for _, line in lines]) + note


def _host(rows: list[Row]) -> str:
    lines = [
        (
            row["mode"],
            row["contender"],
            row["failure"] or f"{row['ms']:.2f}",
            number(row.get("of_best_eager"), "{:.2f}"),
        )
        for row in rows
    ]
    if not rows:
        return ""
    return "## CPU time of a step\n\nOne image.\n\n" + table(("mode", "contender", "ms", "of the best eager"), lines)


def _variants(rows: list[Row]) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    times = {(row["pass"], row["variant"]): row["failure"] or f"{row['p50_ms']:.3f}" for row in rows}
    lines = [(each, *(times.get((each, name), "–") for name in names)) for each in passes]
    return "## Variants of the kernels\n\nMilliseconds in a CUDA graph.\n\n" + table(("pass", *names), lines)


def _counters(rows: list[Row]) -> str:
    if not rows:
        return ""
    known = [name for name in COUNTERS if any(name in row["metrics"] for row in rows)]
    lines = [(row["kernel"], *(row["metrics"].get(name, "–") for name in known)) for row in rows]
    return "## Counted by ncu\n\n" + table(("kernel", *known), lines)
