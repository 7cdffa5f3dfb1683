"""``python -m bench.machine_code``: what the compiler makes of every launch of models, and the counts of a whole pass.

Registers, spills, shared memory and static instructions come from the compiler; occupancy follows from them. Bytes and
FLOPs are counted from the launches; limits are these divided by a data sheet's rates (chips.py). Times on an H200 are
modelled (resource_model.py): nothing here ran on a GPU. Needs the package installed (``pip install -e .[bench]``), but
no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from typing import Any

from convnext_fast.kernels.targets import TARGETS
from rich.console import Console
from rich.table import Table

from bench.static_analysis.analysis import Compiled, analyse_all
from bench.static_analysis.chips import CHIP_OF, Chip
from bench.static_analysis.counts import (
    BUDGETS,
    COUNTED,
    PEERS,
    Counts,
    count_tiny,
    flops,
    output_elements,
    traffic,
)
from bench.static_analysis.executed import BATCH, instructions_per_output
from bench.static_analysis.recording import MODES, Specialised
from bench.static_analysis.resource_model import BOUNDS, MEASURED, PASSES, ModelledPass, model_pass
from bench.static_analysis.sweep import DTYPES, Kernel, Pass, collect, faults, large_tile, passes
from convnext_fast.config import VARIANTS


def precision(specialised: Specialised, dtype: str) -> str:
    """Which of a chip's rates the matrix products of a kernel run at: "16-bit", "tf32" or "fp32"."""
    if dtype != "fp32":
        return "16-bit"
    return "tf32" if "tf32" in specialised.constants.values() else "fp32"


def limit(moved: int, work: int | None, kind: str, chip: Chip) -> float | None:
    """The least microseconds of a launch on a chip: the greater of bytes over bandwidth and FLOPs over peak.

    None without a count of FLOPs. Real times are longer; for an H200 `resource_model` models them.
    """
    return None if work is None else 1e6 * max(moved / chip.bandwidth, work / chip.flops_of(kind))


def row(kernel: Kernel, compiled: Compiled, executed: float | None) -> dict[str, Any]:
    """What is known about one compiled kernel. Where its launches differ, the row describes the first.

    ``executed``: thread instructions per output element, None if not counted (executed.py).
    """
    specialised, launch, dtype = kernel.specialised, kernel.launches[0], kernel.first.dtype
    chip = CHIP_OF[specialised.target]
    read, written = traffic(launch, compiled, kernel.own)
    work = flops(launch, compiled)
    outputs = output_elements(launch, compiled)
    return {
        "kernel": compiled.kernel,
        "target": compiled.target,
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared": compiled.shared,
        "num_warps": compiled.num_warps,
        "occupancy": chip.occupancy(compiled.registers, compiled.shared, compiled.num_warps),
        "first": dataclasses.asdict(kernel.first),
        "faults": faults(kernel, compiled),
        "launches": len(kernel.launches),
        "grid": list(launch.grid),
        "constants": {
            specialised.kernel.params[path[0]].name: value
            for path, value in specialised.constants.items()
            if isinstance(value, (int, str, bool))
        },
        "instructions": compiled.instructions,
        "instructions_per_output": executed,
        "matrix": compiled.matrix,
        "large_tile": large_tile(launch),
        "read_widths": compiled.read,
        "written_widths": compiled.written,
        "bytes_read": read,
        "bytes_written": written,
        "bytes_per_output": (read + written) / outputs if outputs else None,
        "flops": work,
        "chip": chip.name,
        "limit_us": limit(read + written, work, precision(specialised, dtype), chip),
    }


def rows(chosen: list[Pass], **options: Any) -> list[dict]:
    """`row` of every kernel that Triton compiles for the passes, each once, in the order of `collect`."""
    kernels = list(collect(chosen, **options))
    described = analyse_all([kernel.specialised for kernel in kernels])
    executed = instructions_per_output(chosen, **options)
    return [row(*each, executed.get(each[0].specialised.key)) for each in zip(kernels, described, strict=True)]


def summary_table(found: list[dict], chosen: list[Pass]) -> Table:
    """A table by dtype and target, with the faults."""
    table = Table(title=f"{len(found)} kernels of {len(chosen)} passes")
    for name in ("dtype", "target", "kernels", "of them spill", "most shared", "limit", "large tiles", "warp groups"):
        table.add_column(name, justify="left" if name in ("dtype", "target") else "right")
    for dtype, target in dict.fromkeys((each["first"]["dtype"], each["target"]) for each in found):
        some = [each for each in found if each["first"]["dtype"] == dtype and each["target"] == target]
        large = [each for each in some if each["large_tile"]]
        table.add_row(
            dtype,
            target,
            str(len(some)),
            str(sum(each["spills"] > 0 for each in some)),
            f"{max(each['shared'] for each in some) / 1024:.0f} KiB",
            f"{CHIP_OF[target].shared_block / 1024:.0f} KiB",
            str(len(large)),
            str(sum(each["matrix"] == ["HGMMA"] for each in large)) if target == "sm_90" else "",
        )
    return table


def kernel_table(found: list[dict], title: str) -> Table:
    """The rows as a table."""
    table = Table(
        title=title,
        caption="The limit is counted bytes or FLOPs over the data sheet's rates. Instructions an output: "
        f"thread instructions counted as executed for {BATCH} images by an emulator of sm_80, over elements of the "
        "largest tensor written; other targets' code, and launches that differ at 128 images, are not executed.",
    )
    table.add_column("kernel", no_wrap=True)
    table.add_column("shape")
    for name in ("target", "×", "regs", "spills", "shared", "occ."):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("static instructions, %")
    for name in ("instr./output", "B/output", "limit µs"):
        table.add_column(name, justify="right")
    for each in found:
        total = sum(each["instructions"].values())
        mix = sorted(each["instructions"].items(), key=lambda item: -item[1])[:5]
        shape = "×".join(str(each["constants"][name]) for name in ("C", "K", "N") if name in each["constants"])
        table.add_row(
            each["kernel"],
            shape or "×".join(map(str, each["grid"])) + " programs",
            each["target"],
            str(each["launches"]),
            str(each["registers"]),
            f"[red]{each['spills']}[/red]" if each["spills"] else "0",
            f"{each['shared'] / 1024:.0f} KiB",
            f"{each['occupancy']:.0%}",
            " ".join(f"{name} {100 * n / total:.0f}" for name, n in mix),
            f"{each['instructions_per_output']:.1f}" if each["instructions_per_output"] else "",
            f"{each['bytes_per_output']:.1f}" if each["bytes_per_output"] else "",
            f"{each['limit_us']:.1f}" if each["limit_us"] is not None else "FLOPs not counted",
        )
    return table


def count_table(counts: dict[tuple[str, int | None], Counts]) -> Table:
    """Counts of the passes next to the budgets and the peers."""
    table = Table(
        title="ConvNeXt-T, 224², bf16, batch 128: counted from recorded launches",
        caption="MB an image. Training: forward and backward, no loss, no optimiser, no drop path. "
        "PyTorch's own operators count as one launch each.",
    )
    for name in ("pass", "DRAM MB", "launches", "of them ours", "GFLOP an image", "saved MB", "budget missed"):
        table.add_column(name, justify="left" if name in ("pass", "budget missed") else "right")
    for (mode, level), each in counts.items():
        missed = each.missed(BUDGETS[mode, level])
        table.add_row(
            mode if level is None else f"{mode}, recompute {level}",
            f"{each.megabytes:.1f}",
            str(each.launches),
            str(each.own_launches),
            f"{each.gflops:.1f}" + (f" without {', '.join(each.uncounted)}" if each.uncounted else ""),
            f"{each.saved:.1f}" if level is not None else "",
            ", ".join(f"[red]{name} > {most:g}[/red]" for name, (_, most) in missed.items()) or "none",
        )
    table.add_section()
    for peer in PEERS:
        table.add_row(f"{peer.name}, inference", _range(peer.forward), _range(peer.forward_launches))
        table.add_row(
            f"{peer.name}, training", _range(peer.step), _range(peer.step_launches), "", "", f"{peer.saved:.1f}"
        )
    return table


def model_table(made: ModelledPass) -> Table:
    """What bounds each kind of launch of a pass on an H200, and its modelled time."""
    measured = MEASURED.get(made.name)
    table = Table(
        title=f"ConvNeXt-T, {made.name}: {made.milliseconds:.2f} ms modelled on an H200, {made.limit:.2f} at the limit"
        + (f", {measured} measured before" if measured else ""),
        caption="µs a launch, modelled from walked sm_90 code (resource_model.py), not measured.",
    )
    table.add_column("kernel", no_wrap=True)
    table.add_column("shape")
    for name in ("×", "programs", "an SM", "waves", "modelled", "limit", *BOUNDS):
        table.add_column(name, justify="right", no_wrap=True)
    for each, places in made.kinds():
        bounds = [f"{each.bounds[name]:.1f}" if name in each.bounds else "" for name in BOUNDS]
        place = list(BOUNDS).index(each.bound)
        bounds[place] = f"[bold]{bounds[place]}[/bold]"
        table.add_row(
            each.kernel,
            each.shape,
            str(len(places)),
            str(each.programs or ""),
            str(each.resident or ""),
            f"{each.waves:.2f}" if each.programs else "",
            f"{each.microseconds:.1f}",
            f"{each.limit:.1f}",
            *bounds,
        )
    return table


def summary(made: list[ModelledPass]) -> dict[str, dict[str, float]]:
    """The totals of passes on an H200, by name."""
    return {
        "modelled_ms": {each.name: round(each.milliseconds, 3) for each in made},
        "limit_ms": {each.name: round(each.limit, 3) for each in made},
        "measured_before_ms": {each.name: MEASURED[each.name] for each in made if each.name in MEASURED},
        "launches": {each.name: len(each.launches) for each in made},
    }


def _range(values: tuple[float, float]) -> str:
    least, most = values
    return f"{least:g}" if least == most else f"{least:g}–{most:g}"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__.split("\n")[0])
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument("--variant", choices=VARIANTS, **several, help="default: tiny")
    parser.add_argument("--dtype", choices=DTYPES, **several, help="default: bf16")
    parser.add_argument("--mode", choices=MODES, **several, help="default: training")
    parser.add_argument("--recompute", type=int, choices=(0, 1, 2), **several, help="default: 1")
    parser.add_argument("--drop-path", type=float, **several, help="rate of the last block in training; default: 0")
    parser.add_argument("--target", choices=TARGETS, **several, help="default: all")
    parser.add_argument("--summary", action="store_true", help="only the modelled times of whole passes on an H200")
    parser.add_argument("--json", action="store_true", help="print the kernels, or the summary, as JSON")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    if given.summary and given.json:
        print(json.dumps(summary([model_pass(name) for name in PASSES]), indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    if given.summary:
        for name in PASSES:
            console.print(model_table(model_pass(name)))
        return
    chosen = passes(
        given.variant or ["tiny"],
        given.dtype or ["bf16"],
        given.mode or ["training"],
        given.recompute or [1],
        given.target or TARGETS,
        given.drop_path or [0.0],
    )
    found = rows(chosen)
    if given.json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return
    variants, dtypes = ", ".join(given.variant or ["tiny"]), ", ".join(given.dtype or ["bf16"])
    console.print(kernel_table(found, f"ConvNeXt {variants}, {dtypes}: each kernel in the pass that launches it first"))
    console.print(summary_table(found, chosen))
    for each in found:
        for fault in each["faults"]:
            console.print(f"[red]{each['kernel']}[/red] {each['constants']} ({Pass(**each['first'])}): {fault}")
    console.print(count_table({each: count_tiny(*each) for each in COUNTED}))
    for name in PASSES:
        console.print(model_table(model_pass(name)))


if __name__ == "__main__":
    main()
