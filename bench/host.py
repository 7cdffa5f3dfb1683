"""What a step of ConvNeXt costs the host: ours, timm's and transformers' models, and torch.compile of each.

    python -m bench.host [--variant tiny] [--modes inference training] [--contenders eager fused ...] [--output FOLDER]

A figure is the CPU time of all threads in a step, until everything is launched. All contenders of a mode are in memory
at once and run alternately. A ratio is the median of the rounds' ratios, so that other work on the machine disturbs it
little. It runs on a GPU, or on a CUDA driver that does nothing: ``PYTHONPATH=. hollow_gpu/run bench/host.py``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import environment, report
from bench.results import Results, slug
from bench.timing import failure
from convnext_fast import ConvNext, fuse, graphed

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
MODES = ("inference", "training", "training autocast")
"""All in bfloat16; the last one under autocast, with float32 parameters and with drop path."""
DROP_PATH = 0.1
WARM_UP, STEPS = 6, 5
UNFUSED = {
    "of_best_eager": ("eager", "eager channels_last", "eager transformers"),
    "of_best_compiled": ("compile", "compile transformers"),
}
"""The contenders that a time is compared with; the second entry is for compiled models only."""
_LAUNCHES = {"launches": "hollow_launches", "graphs": "hollow_graph_launches"}

Step = Callable[[], None]


def timm_model(variant: str, rate: float) -> nn.Module:
    """timm's ConvNeXt; ``rate``: its drop-path rate."""
    import timm

    return timm.create_model(f"convnext_{variant}".replace("_v2", "v2"), drop_path_rate=rate)


def transformers_model(variant: str, rate: float) -> nn.Module:
    """transformers' ConvNeXt."""
    import transformers

    from convnext_fast.config import VARIANTS

    depths, widths = VARIANTS[variant][:2]
    name = "ConvNextV2" if variant.startswith("v2_") else "ConvNext"
    config = getattr(transformers, f"{name}Config")(
        depths=list(depths), hidden_sizes=list(widths), num_labels=1000, drop_path_rate=rate
    )
    return getattr(transformers, f"{name}ForImageClassification")(config)


def fused(model: nn.Module) -> nn.Module:
    """``model`` after `fuse`."""
    fuse(model, strict=True)
    return model


def ours(variant: str, rate: float, recompute: int = 1, **options: Any) -> nn.Module:
    """This package's model."""
    model = ConvNext(variant, drop_path_rate=rate, **options)
    model.recompute = recompute
    return model


CONTENDERS: dict[str, Callable[[str, float], nn.Module]] = {
    "eager": timm_model,
    "eager channels_last": lambda *of: timm_model(*of).to(memory_format=torch.channels_last),
    "eager transformers": transformers_model,
    "compile": lambda *of: torch.compile(timm_model(*of)),
    "compile reduce-overhead": lambda *of: torch.compile(timm_model(*of), mode="reduce-overhead"),
    "fused": ours,
    "fused recompute 0": lambda *of: ours(*of, recompute=0),
    "fused recompute 2": lambda *of: ours(*of, recompute=2),
    "frozen": lambda *of: ours(*of).freeze(),
    "frozen graph": lambda *of: ours(*of, device=DEVICE).freeze(cuda_graph=True),
    "fuse(timm)": lambda *of: fused(timm_model(*of)),
    "fuse(transformers)": lambda *of: fused(transformers_model(*of)),
    "fuse(timm) frozen": lambda *of: fuse(timm_model(*of)).freeze().model,
    "fuse(transformers) frozen": lambda *of: fuse(transformers_model(*of)).freeze().model,
    "fuse(timm) frozen graph": lambda *of: fuse(timm_model(*of).to(DEVICE)).freeze(cuda_graph=True).model,
    "graphed fused": ours,
    "compile fused": lambda *of: torch.compile(ours(*of)),
    "compile frozen": lambda *of: torch.compile(ours(*of).freeze()),
    "compile fuse(timm)": lambda *of: torch.compile(fused(timm_model(*of))),
    "compile fuse(timm) frozen": lambda *of: torch.compile(fuse(timm_model(*of)).freeze().model),
    "compile transformers": lambda *of: torch.compile(transformers_model(*of)),
    "compile fuse(transformers)": lambda *of: torch.compile(fused(transformers_model(*of))),
    "compile fuse(transformers) frozen": lambda *of: torch.compile(fuse(transformers_model(*of)).freeze().model),
}
"""How the model of each contender is made; "frozen" is only for inference, "graphed" and "recompute" for training."""


def image(dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """One image."""
    return torch.randn(1, 3, 224, 224, device=DEVICE, dtype=dtype)


def step_of(model: nn.Module, mode: str) -> Step:
    """A forward of one image and, in training, its backward, without an optimiser."""
    training, autocast = mode != "inference", mode == "training autocast"
    model.train(training)
    x = image(torch.float32 if autocast else DTYPE)
    gradient = torch.randn(1, 1000, device=DEVICE, dtype=DTYPE)
    parameters = list(model.parameters())

    def logits() -> torch.Tensor:
        with torch.autocast("cuda", DTYPE, enabled=autocast):
            result = model(x)
        return result if isinstance(result, torch.Tensor) else result.logits

    def infer() -> None:
        with torch.no_grad():
            logits()

    def train() -> None:
        for parameter in parameters:
            parameter.grad = None
        logits().backward(gradient)

    return train if training else infer


def measure(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """For each step its median CPU milliseconds, and the medians of their ratios to the best unfused step of a round.

    Also its launches, if the driver counts them, as the CUDA driver that does nothing does.
    """
    counters = _counters()
    taken: list[dict[str, float]] = []
    counts: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        taken.append({})
        for name, step in steps.items():
            step()  # so that it does not pay for the caches that another step left
            before = {what: count() for what, count in counters.items()}
            spent = 0.0
            for _ in range(STEPS):
                torch.cuda.synchronize()  # a full queue would make the host wait for the device
                begun = time.process_time()
                step()
                spent += time.process_time() - begun
            taken[-1][name] = 1e3 * spent / STEPS
            counts[name] = {what: (count() - before[what]) / STEPS for what, count in counters.items()}
    found: dict[str, dict[str, float]] = {}
    for name in steps:
        found[name] = {"ms": statistics.median(each[name] for each in taken), **counts[name]}
        for ratio, unfused in UNFUSED.items():
            others = [other for other in unfused if other in steps]
            if others and (ratio == "of_best_eager" or name.startswith("compile")):
                found[name][ratio] = statistics.median(
                    each[name] / min(each[other] for other in others) for each in taken
                )
    return found


def _counters() -> dict[str, Callable[[], int]]:
    process = ctypes.CDLL(None)
    found = {what: getattr(process, name) for what, name in _LAUNCHES.items() if hasattr(process, name)}
    for count in found.values():
        count.restype = ctypes.c_long
    return found


def rows(variant: str, mode: str, names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each contender: its time, and the ratio to the best unfused one's (see ``UNFUSED``).

    Raises:
        ValueError: no eager contender is among ``names``.
    """
    if not any(name in UNFUSED["of_best_eager"] for name in names):
        raise ValueError(f"the contenders are {', '.join(names)}: expected an eager one among them")
    autocast = mode == "training autocast"
    dtype = torch.float32 if autocast else DTYPE
    others = ("graphed", "recompute") if mode == "inference" else ("frozen",)
    steps, failures = {}, {}
    for name in names:
        if any(word in name for word in others):
            continue
        try:
            model = CONTENDERS[name](variant, DROP_PATH if autocast else 0.0).to(DEVICE, dtype)
            if "graphed" in name:
                with torch.autocast("cuda", DTYPE, enabled=autocast, cache_enabled=False):
                    graphed(model.train(), image(dtype))
            step = step_of(model, mode)
            for _ in range(WARM_UP):
                step()
            steps[name] = step
        except Exception as error:
            failures[name] = failure(error)
    gc.collect()
    found = measure(steps, rounds)
    head = {"section": "host", "variant": variant, "mode": mode}
    return [
        *(
            {"key": f"host/{variant}/{mode}/{name}", **head, "contender": name, "failure": None, **figures}
            for name, figures in found.items()
        ),
        *(
            {"key": f"host/{variant}/{mode}/{name}", **head, "contender": name, "failure": reason}
            for name, reason in failures.items()
        ),
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = []
    for row in found:
        cells = [
            row["failure"] or report.number(row.get("of_best_eager"), "{:.2f}"),
            report.number(row.get("of_best_compiled"), "{:.2f}"),
            report.number(row.get("ms"), "{:.2f}"),
        ]
        counts = [report.number(row.get(what), "{:.0f}") for what in _LAUNCHES]
        lines.append([row["mode"], row["contender"], *cells, *counts])
    head = ["mode", "contender", "of the best eager", "of the best compiled", "ms", "launches", "graphs"]
    return report.table(head, lines)


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar for each contender in each mode.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in found if not row["failure"] and "of_best_eager" in row]
    modes = list(dict.fromkeys(row["mode"] for row in timed))
    figure = Figure(figsize=(5.5 * len(modes), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, mode in enumerate(modes):
        group = [row for row in timed if row["mode"] == mode][::-1]
        axes = figure.add_subplot(1, len(modes), i + 1)
        ours = ["fuse" in row["contender"] or "frozen" in row["contender"] for row in group]
        colours = ["#D55E00" if own else "#0072B2" for own in ours]
        axes.barh([row["contender"] for row in group], [row["of_best_eager"] for row in group], color=colours)
        axes.axvline(1.0, color="black", linewidth=0.7)
        axes.set_xlabel("host time of a step, of the best eager one")
        axes.set_title(mode, fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--output", type=Path, help="folder for results.json and host.png (default: one for the device)"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a GPU, or hollow_gpu, a CUDA that does nothing")
    if _counters():
        torch.backends.cudnn.enabled = False  # its library needs a real driver; ATen's own convolutions run instead
    facts = environment.facts(DEVICE)
    folder = options.output or environment.ROOT / "bench" / "results" / f"{slug(str(facts['device']))}-host"
    results = Results(folder, facts)
    for mode in options.modes:
        results.add(*rows(options.variant, mode, options.contenders, options.rounds))
    found = [row for row in results.rows if row["section"] == "host" and row["variant"] == options.variant]
    draw(found, folder / "host.png")
    print(table(found))


if __name__ == "__main__":
    main()
