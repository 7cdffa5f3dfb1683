"""A folder of results as a Markdown report: every row that was measured, including those where we are slower."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import gpu_report, plots
from bench.markdown import number, of, table
from bench.results import read, write_whole
from bench.scaling import AXES, deviation
from bench.variants import is_ours

FILE = "report.md"
Row = dict[str, Any]


def write(folder: Path) -> None:
    """Write ``report.md`` beside the results, and the plots where matplotlib is installed.

    Raises:
        ValueError: the folder holds no rows.
    """
    rows = read(folder)
    if not rows:
        raise ValueError(f"{folder} holds no rows")
    try:
        drawn, note = plots.draw(rows, folder), ""
    except ImportError as error:
        drawn, note = [], f"\nThere are no plots: {error}.\n"
    write_whole(folder / FILE, text(rows, drawn) + note)


def line(row: Row) -> str:
    """A row as a line of text, printed while the study runs."""
    name = row["key"]
    if row["failure"]:
        return f"{name}: {row['failure']}"
    if "of_roofline" in row:
        speed = f", {row['images_per_s']:.1f} images/s" if "images_per_s" in row else ""
        return f"{name}: {row['p50_ms']:.2f} ms{speed}, {row['of_roofline']:.0%} of roofline, error {row['error']:.1e}"
    if row["section"] == "correctness":
        error = f", error {row['error']:.1e} of {row['error_bound']:.1e} allowed" if "error" in row else ""
        return f"{name}: {'right' if row['passed'] else 'WRONG'}{error}"
    figures = (f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, float))
    return f"{name}: {', '.join(figures)}" if row["section"] != "finished" else f"{name}"


def text(rows: Sequence[Row], drawn: Sequence[str]) -> str:
    """The report."""
    parts = [
        _head(rows),
        _correctness(of(rows, "correctness")),
        *_models(of(rows, "models"), drawn),
        _stages(of(rows, "stages"), drawn),
        _scaling(of(rows, "scaling")),
        _alternating(of(rows, "alternating")),
        _startup(of(rows, "startup")),
        *gpu_report.sections(rows),
        _modelled(of(rows, "modelled")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def best_peer(cell: Iterable[Row]) -> Row | None:
    """The fastest row that is not ours; None where none ran."""
    peers = [row for row in cell if not is_ours(row["contender"]) and not row["failure"]]
    return min(peers, key=lambda row: row["p50_ms"], default=None)


def best_own(cell: Iterable[Row]) -> Row | None:
    """Our fastest row; None where none ran."""
    own = [row for row in cell if is_ours(row["contender"]) and not row["failure"]]
    return min(own, key=lambda row: row["p50_ms"], default=None)


def cells(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by work, which is their key without the contender."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["key"].rsplit("/", 1)[0], []).append(row)
    return found


def versions(rows: Sequence[Row]) -> str:
    """Device, versions and commits of the rows, as part of a sentence."""
    row = rows[0]
    words = [row["device"]]
    if "threads" in row:
        words.append(f"{row['threads']} threads, {row['cpu_capability']}")
    words += [
        f"{name} {row[name]}" for name in ("cuda", "rocm", "torch", "triton", "onnxruntime", "openvino") if name in row
    ]
    commits = sorted({each["commit"] for each in rows})
    return ", ".join(words) + f"; commit {', '.join(commits)}"


def _head(rows: Sequence[Row]) -> str:
    found = [f"# Results on {rows[0]['device']}", f"{versions(rows)}; Python {rows[0]['python']}."]
    for row in of(rows, "rates"):
        for name, label in (("measured", "Rates of this machine"), ("held_against", "Roofline")):
            flops = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in row[name]["flops"].items())
            found.append(f"{label} ({row[name]['source']}): {flops}; memory {row[name]['bandwidth'] / 1e9:.3g} GB/s.")
    found.append(
        "Times are medians, with the 20th and 80th percentile. GB/s and TFLOP/s count what the work cannot do without: "
        "each block's input, output and parameters once, and the products of convolutions and linear layers, nothing "
        "that is computed anew. A contender of which an output or gradient is further from float64 than twice eager's "
        "error in the same dtype (in float32: than 1e-5, if that is more) has no time; the error given is the one "
        "nearest to its bound."
    )
    return "\n\n".join(found)


def _correctness(rows: list[Row]) -> str:
    if not rows:
        return ""
    ran = [row for row in rows if row["passed"] is not None]
    right = sum(row["passed"] for row in ran)
    found = ["## Correctness", f"{right} of {len(ran)} checks passed."]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in ran:
        groups.setdefault((row["check"], row["op"], row["dtype"]), []).append(row)
    lines = []
    for (check, op, dtype), group in groups.items():
        worst = max(group, key=lambda row: row.get("error", 0.0) / (row.get("error_bound") or 1.0))
        error = f"{worst['error']:.1e} of {worst['error_bound']:.1e}" if "error" in worst else "–"
        wrong = [row["failure"] or "wrong" for row in group if not row["passed"]]
        lines.append((check, op, dtype, str(len(group)), error, "; ".join(wrong) or "right"))
    found.append(table(("check", "op", "dtype", "cases", "worst error, of allowed", "result"), lines))
    found += [f"Not run: {row['check']} ({row['failure']})." for row in rows if row["passed"] is None]
    return "\n\n".join(found)


def _timed_table(cell: list[Row]) -> str:
    """A line for each contender, the fastest first, those without a time last."""
    peer = best_peer(cell)
    lines = []
    for row in sorted(cell, key=lambda row: row.get("p50_ms", float("inf"))):
        name = f"**{row['contender']}**" if is_ours(row["contender"]) else row["contender"]
        if row["failure"]:
            lines.append((name, row["failure"], *[""] * 9))
            continue
        lines.append(
            (
                name,
                f"{row['p50_ms']:.2f} ({row['p20_ms']:.2f}–{row['p80_ms']:.2f})",
                number(row.get("images_per_s")),
                number(peer and peer["p50_ms"] / row["p50_ms"], "{:.2f}"),
                f"{row['gbs']:.1f}",
                f"{row['tflops']:.3f}",
                f"{row['of_roofline']:.0%}",
                number(row["peak_mib"]),
                number(row["saved_mib"]),
                f"{row['error']:.1e}",
                f"{row['first_call_s']:.1f}",
            )
        )
    columns = ("", "ms (p20–p80)", "images/s", "× best peer", "GB/s", "TFLOP/s", "of roofline")
    return table((*columns, "peak MiB", "saved MiB", "error", "first call, s"), lines)


def _models(rows: list[Row], drawn: Sequence[str]) -> list[str]:
    if not rows:
        return []
    found = [
        "## Models",
        "Ours are bold. Training is forward and backward, without the optimiser. Saved: for the backward pass. "
        "The first call includes making the model and compiling, or reading PyTorch's cache on disk where that has it.",
        *(f"![]({name})" for name in drawn if not name.startswith("stages")),
    ]
    for cell in cells(rows).values():
        row = cell[0]
        found.append(f"### ConvNeXt {row['variant']}, {row['mode']}, {row['batch']} × {row['side']}², {row['dtype']}")
        found.append(_timed_table(cell))
    return found


def _stages(rows: list[Row], drawn: Sequence[str]) -> str:
    if not rows:
        return ""
    found = ["## One block of each stage", *(f"![]({name})" for name in drawn if name.startswith("stages"))]
    for cell in cells(rows).values():
        row = cell[0]
        found.append(f"### {row['op']}, {row['mode']}, {'×'.join(map(str, row['shape']))}, {row['dtype']}")
        found.append(_timed_table(cell))
    return "\n\n".join(found)


def _scaling(rows: list[Row]) -> str:
    if not rows:
        return ""
    found = ["## Scaling", "Training steps of `fused`; distance from the straight line through the ends of each axis."]
    for axis in AXES:
        points = [row for row in rows if row["axis"] == axis and not row["failure"]]
        lines = [(str(r["size"]), f"{r['p50_ms']:.2f}", number(r["saved_mib"]), number(r["peak_mib"])) for r in points]
        lines += [(r["key"], r["failure"], "", "") for r in rows if r["axis"] == axis and r["failure"]]
        label = {"batch": "images", "side": "pixels an image", "depth": "blocks"}[axis]
        found.append(table((label, "ms", "saved MiB", "peak MiB"), lines))
        found.append("Furthest from linear: " + ", ".join(_deviations(points)) + ".")
    return "\n\n".join(found)


def _deviations(points: list[Row]) -> Iterable[str]:
    for name, what in (("p50_ms", "time"), ("saved_mib", "saved memory"), ("peak_mib", "peak memory")):
        known = [(row["size"], row[name]) for row in points if row[name] is not None]
        yield f"{what} {number(deviation(known), '{:.1%}')}"


def _alternating(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [
        (r["contender"], r["failure"], "", "") if r["failure"] else
        (r["contender"], f"{r['fixed_s']:.3f}", f"{r['mixed_s']:.3f}", f"{r['ratio']:.2f}")
        for r in rows
    ]  # fmt: skip
    title = "## Sizes that change from step to step\n\nSeconds of one step of each of twelve batch and image sizes."
    return title + "\n\n" + table(("", "sizes in order", "sizes mixed", "mixed / in order"), lines)


def _startup(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        if row["failure"]:
            lines.append((row["what"], row["failure"], "", ""))
            continue
        figures = (row["first_call_s"], row.get("first_call_compiled_s"), row.get("cached_call_s"))
        lines.append((row["what"], *(number(value, "{:.3f}") for value in figures)))
    columns = ("", "first, s", "first in a new process, kernels compiled before, s", "later, s")
    return "## Start-up\n\n" + table(columns, lines)


def _modelled(rows: list[Row]) -> str:
    """Totals of whole passes; rows of earlier versions, which modelled only bytes and products, are left out."""
    rows = [row for row in rows if "pass" in row]
    if not rows:
        return ""
    lines = []
    for row in rows:
        if row["failure"]:
            lines.append((row["pass"], row["failure"], "", "", ""))
            continue
        figures = (f"{row['modelled_ms']:.2f}", f"{row['limit_ms']:.2f}", number(row["earlier_ms"], "{:.2f}"))
        lines.append((row["pass"], *figures, str(row["launches"])))
    columns = ("pass", "modelled ms", "limit ms", "measured before, ms", "launches")
    return (
        "## Modelled, not measured\n\n"
        "Nothing in this section ran. ConvNeXt-T, 224², on an H200: the limit is bytes through DRAM or matrix products "
        "of each launch over the chip's measured rates; the modelled time also knows the L2 cache, the units of a "
        "processor, occupancy and the serial chain of a program, from walked machine code for sm_90. Measured before: "
        "inside a CUDA graph, of the code of 2026-11-27.\n\n" + table(columns, lines)
    )
