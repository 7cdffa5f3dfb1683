"""``python -m bench.study``: is it right on this device, and how fast is it beside eager, torch.compile and others?

Writes ``results.json`` after every row, and at the end ``report.md`` and plots, to
``bench/results/<device>-<date>/``. The same command with the same ``--output`` continues where it stopped. The exit
status is 1 if a fused op or model was wrong or failed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import environment, plan, readme, report
from bench.environment import ROOT
from bench.results import Results, read, slug
from bench.variants import is_ours

HOME = ROOT / "bench" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m bench.study", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="only ConvNeXt-T, few sizes: under 8 minutes")
    parser.add_argument(
        "--only",
        metavar="PART",
        action="append",
        help=f"{', '.join(plan.SECTIONS)}, or the start of rows' keys (models/base/8x224); may be given several times",
    )
    parser.add_argument("--output", type=Path, help="folder of the results; a study in it is continued")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--report", action="store_true", help="measure nothing, write report and plots of --output")
    parser.add_argument(
        "--readme", type=Path, nargs="+", metavar="FOLDER", help="write the tables of README.md and bench/README.md"
    )
    chosen = parser.parse_args(argv)
    try:
        if chosen.readme:
            readme.update(chosen.readme)
            return 0
        device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        if chosen.report and chosen.output is None:
            parser.error("--report needs --output")
        folder = chosen.output or default_folder(device, chosen.quick)
        if not chosen.report:
            run(device, folder, chosen.quick, tuple(chosen.only or ()))
        report.write(folder)
        print(f"wrote {folder / report.FILE}")
        return 1 if failed(folder) else 0
    except (ValueError, OSError, ImportError) as error:
        print(f"bench.study: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench.study: interrupted; the same command continues from here", file=sys.stderr)
        return 130


def default_folder(device: torch.device, quick: bool) -> Path:
    """``bench/results/<device>-<date>``; quick results are kept apart."""
    cores = f"-{os.cpu_count()}-cores" if device.type == "cpu" else ""
    name = f"{slug(environment.device_name(device))}{cores}-{datetime.date.today().isoformat()}"
    return HOME / (name + ("-quick" if quick else ""))


def run(device: torch.device, folder: Path, quick: bool, only: tuple[str, ...] = ()) -> None:
    """Measure what is not yet in the folder; ``only``: see `plan.Study.steps`.

    Raises:
        ValueError: there is nothing to measure, or the folder holds results of another device.
    """
    results = Results(folder, environment.facts(device))
    # Each contender compiles the same code again, on purpose.
    torch._dynamo.config.recompile_limit = 64
    roofline = functools.cache(lambda: _rates(results, device))
    budget = (2.0 if device.type == "cpu" else 1.0) if quick else 5.0
    steps = plan.Study(device, roofline, quick, budget).steps(only)
    with _Progress(len(steps)) as progress:
        follow(steps, results, progress, lambda: _check_alive(device))


def follow(steps: Sequence[plan.Step], results: Results, progress: Progress, between: Callable[[], None]) -> None:
    """Run the steps that are not finished and add every row to the results; call ``between`` after each."""
    for step in steps:
        progress.start(step)
        if not step.finished(results):
            for row in step.rows():
                results.add(row)
                progress.say(report.line(row))
            between()
        progress.finish()


class Progress(Protocol):
    """Is told of the progress of a study."""

    def start(self, step: plan.Step) -> None:
        """A step begins."""

    def say(self, text: str) -> None:
        """A row was added."""

    def finish(self) -> None:
        """The step is done."""


def _rates(results: Results, device: torch.device) -> environment.Roofline:
    """The roofline of the results; measured first, if they have none."""
    key = "rates/measured"
    if key not in results:
        dtypes = ("float32",) if device.type == "cpu" else ("float32", "bfloat16", "float16")
        results.add(rates_row(device, environment.measured_rates(device, dtypes)))
    held = next(row for row in results.rows if row["key"] == key)["held_against"]
    return environment.Roofline(held["flops"], held["bandwidth"], held["source"])


def rates_row(device: torch.device, measured: environment.Roofline) -> dict[str, Any]:
    """The row with the rates that times are compared with."""
    row: dict[str, Any] = {"key": "rates/measured", "section": "rates", "failure": None}
    for name, rates in (("measured", measured), ("held_against", environment.roofline(device, measured))):
        row[name] = {"flops": rates.flops, "bandwidth": rates.bandwidth, "source": rates.source}
    return row


def _check_alive(device: torch.device) -> None:
    """Stop if the device is lost: after an illegal access every later step of the process would fail, too."""
    if device.type == "cpu":
        return
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise OSError(f"this process lost its device ({error}): the same command continues from here") from error


def failed(folder: Path) -> list[dict[str, Any]]:
    """Rows of fused ops and models that were wrong, or that failed for a reason other than a lack of memory or time."""
    excused = ("not run", "no reference", "OutOfMemoryError")
    return [
        row
        for row in read(folder)
        if row.get("passed") is False
        or (is_ours(row.get("contender", "")) and row["failure"] and not row["failure"].startswith(excused))
    ]


class _Progress:
    """Prints a line for each row and, on a terminal, a progress bar."""

    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, step: plan.Step) -> None:
        self.bar.update(self.task, description=f"{step.section}: {step.title}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def finish(self) -> None:
        self.bar.advance(self.task)


if __name__ == "__main__":
    sys.exit(main())
