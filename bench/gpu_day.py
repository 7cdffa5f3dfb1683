"""``python -m bench.gpu_day``: what to measure in fifteen minutes on a GPU, the most important first.

Rates of the chip, correctness, the time of each kernel beside its limit and its modelled time, the host's time,
prepared variants of the kernels, ncu's counters, torch.compile in its fastest mode, the headline rows. Each step runs
in its own process with a time limit, and each row is saved at once, so that neither an error nor a stop loses
anything. Results and report go to ``bench/results/<device>-<date>-gpu-day/``. It needs only PyTorch and Triton; plots
are drawn if matplotlib is installed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import environment, report
from bench.environment import ROOT
from bench.gpu_steps import STEPS, Step
from bench.results import SAME, Results, read, slug
from bench.static_analysis import modelled

COMMAND = (sys.executable, "-m", "bench.gpu_steps")
LONGEST = 12 * 60.0
"""Most seconds of all steps together."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 1 if a step failed or was stopped."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the results go")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: model what --output lacks, rewrite its report"
    )
    given = parser.parse_args(arguments)
    if given.report:
        if given.output is None:
            parser.error("--report needs --output")
        try:
            complete(given.output)
            report.write(given.output)
        except (ValueError, OSError) as error:
            print(f"bench.gpu_day: {error}", file=sys.stderr)
            return 1
        return 0
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device = torch.device("cuda")
    name = f"{slug(environment.device_name(device))}-{datetime.date.today().isoformat()}-gpu-day"
    folder = given.output or ROOT / "bench" / "results" / name
    return 0 if follow(STEPS, folder, LONGEST) else 1


def complete(folder: Path) -> None:
    """Add the modelled times of measured passes that have none because time ran out on the GPU.

    Raises:
        FileNotFoundError, ValueError: see `results.read`.
    """
    rows = read(folder)
    facts = {name: rows[0][name] for name in environment.facts(torch.device("cpu")) if name in rows[0]}
    results = Results(folder, facts | {name: rows[0].get(name) for name in SAME})
    for row in rows:
        key = f"modelled/{row.get('pass')}"
        if row["section"] == "kernels" and not row["failure"] and key not in results:
            results.add(modelled.row(row["pass"]) | {"modelled_with_triton": environment.version("triton")})


def follow(steps: Sequence[Step], folder: Path, longest: float) -> bool:
    """Run the steps one after another for ``longest`` seconds at most; returns whether all of them succeeded.

    After each step a row of section "steps" gives its duration and its error, and the report is written.
    """
    begun = time.monotonic()
    good = True
    for step in steps:
        left = longest - (time.monotonic() - begun)
        start = time.monotonic()
        problem = f"not run: the {longest:.0f} s of all steps are over"
        if left > 1:
            print(f"== {step.name}, at most {min(step.limit, left):.0f} s", flush=True)
            problem = run(step, folder, min(step.limit, left))
        took = time.monotonic() - start
        row = {"key": f"steps/{step.name}", "section": "steps", "step": step.name, "took_s": took, "failure": problem}
        Results(folder, environment.facts(torch.device("cuda"))).add(row)
        report.write(folder)
        print(f"== {step.name}: {problem or 'done'}, {took:.0f} s", flush=True)
        good = good and problem is None
    print(f"wrote {folder / report.FILE}")
    return good


def run(step: Step, folder: Path, limit: float) -> str | None:
    """Run a step in a process of its own; returns what went wrong, None if nothing did."""
    log = folder / f"{slug(step.name)}.log"
    folder.mkdir(parents=True, exist_ok=True)
    command = [*COMMAND, step.name, str(folder)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | step.variables, stderr=errors, start_new_session=True
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text().strip().splitlines()
    if not lines:
        log.unlink()
    if status is None:
        return f"stopped: over its {limit:.0f} s"
    return None if status == 0 else lines[-1] if lines else f"exit status {status}"


if __name__ == "__main__":
    sys.exit(main())
