"""What `bench.gpu_day` does on a GPU: each step is a function that yields rows of results, run in a process of its own.

``python -m bench.gpu_steps STEP FOLDER`` runs one step and adds each row to the folder's results at once.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import correctness, environment, graphs, host, report, study, variants
from bench.cases import OpCase
from bench.plan import Study
from bench.results import Results
from bench.timing import failure, quantiles
from bench.variants import Cell
from convnext_fast.measuring import seconds

Row = dict[str, Any]
BATCHES = {"one": 1, "many": 128, "training": 64}
VARIANT, SIDE = "tiny", 224
BUDGET = 1.0
"""Seconds of sampling for each contender."""
HOST_CONTENDERS = ("eager transformers", "eager channels_last", "compile", "fused", "frozen", "fuse(transformers)")
HOST_ROUNDS = 5
PLAIN = {
    "inference": ("eager channels_last", "frozen", "frozen + CUDA graph"),
    "training": ("eager channels_last", "fused", "fused + CUDA graph"),
}
WIDE = (16, 28, 28, 384)
"""A block with tiles for every processor, as the variants of wide GEMMs need."""
COUNTED = "_hidden_grad|wgrad|dwconv|_fc1"
"""The kernels that ncu profiles."""
NO_NCU = "ncu is not on this machine: install Nsight Compute for the counters"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats", "Occupancy")


def rates(device: torch.device) -> Iterator[Row]:
    """Rates of the chip: the products and the copy that times are compared with, the L2 cache, and launches."""
    held = environment.measured_rates(device, ("float32", "bfloat16", "float16"))
    yield study.rates_row(device, held)
    found = graphs.chip_rates(device)
    yield {"key": "rates/chip", "section": "chip", "failure": None, **found}


def correct(device: torch.device) -> Iterator[Row]:
    """Every fused op in every dtype; several calls in a row, so that some are replays."""
    return correctness.rows(device)


def kernels(device: torch.device) -> Iterator[Row]:
    """The time of each kernel in replays of a CUDA graph, then the resource model's figures for the same passes."""
    from bench.static_analysis import modelled

    for name in graphs.PASSES:
        try:
            yield {
                "key": f"kernels/{name}",
                "section": "kernels",
                "pass": name,
                "failure": None,
                **_profiled(name, device),
            }
        except Exception as error:
            yield {"key": f"kernels/{name}", "section": "kernels", "pass": name, "failure": failure(error)}
    yield from modelled.rows()


def _profiled(name: str, device: torch.device) -> Row:
    replay = graphs.captured_pass(name, device)
    times = [seconds([replay], device) for _ in range(10)]
    events = graphs.kernel_events(replay, device)
    return {**quantiles(times), "kernels": events, "kernels_us": sum(each[1] for each in events)}


def plain_and_graph(device: torch.device) -> Iterator[Row]:
    """CPU time of a step on the host, then times of plain calls, of a CUDA graph and of eager."""
    for mode in ("inference", "training"):
        try:
            yield from host.rows(VARIANT, mode, HOST_CONTENDERS, HOST_ROUNDS)
        except Exception as error:
            yield {"key": f"host/{VARIANT}/{mode}", "section": "host", "mode": mode, "contender": "all"} | {
                "failure": failure(error)
            }
    yield from _cell_rows(device, "inference", BATCHES["one"], PLAIN["inference"])
    yield from _cell_rows(device, "training", BATCHES["training"], PLAIN["training"])


def variant(name: str, device: torch.device) -> Iterator[Row]:
    """Times of passes as CUDA graphs, then errors; the process's environment chooses a variant of the kernels."""
    for each in graphs.PASSES:
        row = {"key": f"variants/{name}/{each}", "section": "variants", "variant": name, "pass": each}
        try:
            replay = graphs.captured_pass(each, device)
            times = [seconds([replay] * 3, device) for _ in range(15)]
            yield row | {"failure": None} | quantiles(times)
        except Exception as error:
            yield row | {"failure": failure(error)}
    for dtype in ("bfloat16", "float16"):
        row = correctness.row_of("against float64", OpCase("convnext_block", WIDE, dtype, "forward"), device)
        yield row | {"key": f"variants/{name}/{row['key']}", "check": f"variant {name} {row['check']}"}


def counters(device: torch.device) -> Iterator[Row]:
    """What ncu counts in a few kernels of a training step."""
    found = ncu_command()
    if found is None:
        raise FileNotFoundError(NO_NCU)
    process = subprocess.run(found, cwd=environment.ROOT, capture_output=True, text=True)
    rows = list(counter_rows(process.stdout))
    if not rows:
        lines = (process.stdout + process.stderr).strip().splitlines()
        raise RuntimeError(f"ncu gave no counters: {lines[-1] if lines else f'exit status {process.returncode}'}")
    yield from rows


def ncu_command() -> list[str] | None:
    """The ncu command that counts, or None without ncu."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return None
    options = ["--clock-control", "none", "--csv", "--page", "details", "--profile-from-start", "off"]
    options += ["--kernel-name", f"regex:{COUNTED}", "--launch-count", "30"]
    options += [part for section in SECTIONS for part in ("--section", section)]
    return [ncu, *options, sys.executable, "-m", "bench.gpu_steps", "profiled-step", "-"]


def counter_rows(text: str) -> Iterator[Row]:
    """Rows of what ``ncu --csv --page details`` printed, one for each launch."""
    lines = text.splitlines()
    first = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, Row] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines[first:]))):
        key = f"counters/{line['ID']}"
        row = found.setdefault(
            key, {"key": key, "section": "counters", "kernel": line["Kernel Name"], "failure": None, "metrics": {}}
        )
        if line["Metric Name"]:
            row["metrics"][line["Metric Name"]] = f"{line['Metric Value']} {line['Metric Unit']}".strip()
    yield from found.values()


def profiled_step(device: torch.device) -> Iterator[Row]:
    """A training step for ncu to profile, after one that compiles the kernels; yields no rows."""
    step = graphs.step_of_pass("training_64_autocast", device)
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return iter(())


def max_autotune(device: torch.device) -> Iterator[Row]:
    """Inference with torch.compile in its fastest mode, to compare ours with."""
    return _cell_rows(device, "inference", BATCHES["many"], ("compile max-autotune",))


def headline(device: torch.device) -> Iterator[Row]:
    """The rows that the README quotes, except those that `plain_and_graph` measures."""
    for mode, batch in (("inference", "many"), ("inference", "one"), ("training", "training")):
        done = () if batch == "many" else PLAIN[mode]
        names = tuple(name for name in variants.contenders(mode, device, quick=True) if name not in done)
        yield from _cell_rows(device, mode, BATCHES[batch], names)


def _cell_rows(device: torch.device, mode: str, batch: int, names: tuple[str, ...]) -> Iterator[Row]:
    cell = Cell(VARIANT, batch, SIDE, "bfloat16", mode)
    roofline = functools.cache(lambda: environment.measured_rates(device, ("bfloat16",)))
    plan = Study(device, roofline, True, BUDGET)
    return plan.model_rows(cell, names, lambda: variants.prepare(names, variants.Subject(cell, device)))


@dataclasses.dataclass(frozen=True)
class Step:
    """A step: its name, the seconds it may take, what it does, and environment variables of its process."""

    name: str
    limit: float
    run: Callable[[torch.device], Iterable[Row]]
    variables: dict[str, str] = dataclasses.field(default_factory=dict)


STEPS = (
    Step("rates", 45, rates),
    Step("correctness", 90, correct),
    Step("kernels", 120, kernels),
    Step("host", 75, plain_and_graph),
    Step("variant default", 40, functools.partial(variant, "default")),
    Step("variant TMA", 50, functools.partial(variant, "TMA"), {"CONVNEXT_FAST_TMA": "1"}),
    Step("variant autotune", 60, functools.partial(variant, "autotune"), {"CONVNEXT_FAST_AUTOTUNE": "1"}),
    Step("counters", 60, counters),
    Step("max-autotune", 120, max_autotune),
    Step("headline", 60, headline),
)
"""In order of importance, in case there is no time for all."""
_HIDDEN = (Step("profiled-step", 60, profiled_step),)


def run(step: Step, folder: Path) -> None:
    """Run a step on the GPU and add each of its rows to the folder's results."""
    device = torch.device("cuda")
    torch._dynamo.config.recompile_limit = 64
    results = Results(folder, environment.facts(device))
    for row in step.run(device):
        results.add(row)
        print(report.line(row), flush=True)


def main() -> None:
    """The command that runs one step in its process."""
    name, folder = sys.argv[1:]
    run(next(step for step in STEPS + _HIDDEN if step.name == name), Path(folder))


if __name__ == "__main__":
    main()
