"""Modelled time of each launch on an H200: what bounds it, and the totals of whole passes.

    model = model_pass("training_64_autocast")
    model.milliseconds, [(each.kernel, each.microseconds, each.bound) for each in model.launches]

The bounds of a launch are what its programs together need of each resource: bytes through DRAM and the L2 cache, the
busiest processor's clocks on its port to the L2 cache, tensor cores, issue slots and shared memory, and the serial
chain of one program, once for every wave of programs. Nothing overlaps perfectly, so the modelled time is a norm of the
bounds, somewhat more than the longest of them, and a launch's own cost. Nothing here ran on a GPU; `RATES` says which
rates were measured and which are assumed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.cache import get_cache_manager

from bench.static_analysis.analysis import analyse_all
from bench.static_analysis.chips import CHIP_OF
from bench.static_analysis.compilation import Launch, Specialised, _cuobjdump, specialise
from bench.static_analysis.counts import average_share, first_writes, flops, programs, traffic
from bench.static_analysis.program_costs import DENSE_FLOPS, Costs, costs
from bench.static_analysis.recording import Buffer, Operator, Recording, record

TARGET, VARIANT = "sm_90", "tiny"
PASSES: dict[str, dict[str, Any]] = {
    "training_64_autocast": {
        "dtype": torch.float32,
        "mode": "training",
        "batch": 64,
        "autocast": torch.bfloat16,
    },
    "training_64": {"dtype": torch.bfloat16, "mode": "training", "batch": 64},
    "inference_128": {"dtype": torch.bfloat16, "mode": "inference", "batch": 128},
    "inference_1": {"dtype": torch.bfloat16, "mode": "inference", "batch": 1},
}
"""ConvNeXt-T at 224², as `recording.record` takes them."""
MEASURED = {"training_64_autocast": 15.37, "inference_128": 4.10, "inference_1": 0.69}
"""Milliseconds on an H200 in a CUDA graph (bench/results/nvidia-h200-2026-11-27-quick), with the code of that day, for
which the model gives 13.7, 3.96 and 0.61."""
BOUNDS = ("dram", "l2", "port", "tensor", "issue", "shared", "chain")
"""What can bound a launch: see `model_launch`."""


OVERLAP = 4
"""Exponent of the norm of the bounds: infinity would be perfect overlap, 1 none. Chosen to match the three ``MEASURED``
times; the first step of `bench.gpu_day` measures rates, its third the time of each kernel."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """The rates of a chip.

    Attributes:
        processors: streaming multiprocessors.
        clock: Hz.
        dram, l2: bytes/s.
        tensor: 16-bit FLOP/s with float32 sums.
        port: bytes per clock that a processor takes from the L2 cache.
        launch: seconds from the end of one kernel to the work of the next in a CUDA graph.
    """

    processors: int
    clock: float
    dram: float
    l2: float
    tensor: float
    port: float
    launch: float


RATES = Rates(
    processors=132,
    clock=1.755e9,
    dram=3.85e12,
    l2=6e12,
    tensor=735e12,
    port=64,
    launch=3e-6,
)
"""An H200. ``dram`` (copying) and ``tensor`` (8192³ products) were measured on one; clock, L2, port and launch are
assumed: public microbenchmarks give 5.5 to 12 TB/s for the L2 cache of Hopper chips."""


@dataclasses.dataclass(frozen=True)
class Modelled:
    """A launch, or an operator of PyTorch, and how many microseconds each resource needs for it.

    ``resident``: programs that a processor holds. ``waves``: programs over what all processors hold. ``limit``: the
    least time for its bytes through DRAM and for its products, without padding.
    """

    kernel: str
    shape: str
    programs: int
    resident: int
    waves: float
    bounds: dict[str, float]
    limit: float
    microseconds: float

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.bounds, key=lambda name: self.bounds[name])


@dataclasses.dataclass(frozen=True)
class ModelledPass:
    """A pass: its launches in order."""

    name: str
    launches: list[Modelled]

    @property
    def milliseconds(self) -> float:
        """Modelled milliseconds of the whole pass."""
        return sum(each.microseconds for each in self.launches) / 1e3

    @property
    def limit(self) -> float:
        """The least milliseconds for the bytes and products of the pass."""
        return sum(each.limit for each in self.launches) / 1e3

    def kinds(self) -> list[tuple[Modelled, list[int]]]:
        """The different launches, each with its positions in the pass."""
        found: dict[tuple[str, str, int, str], list[int]] = {}
        for place, each in enumerate(self.launches):
            found.setdefault((each.kernel, each.shape, each.programs, f"{each.microseconds:.2f}"), []).append(place)
        return [(self.launches[places[0]], places) for places in found.values()]


def model_launch(
    kernel: str,
    shape: str,
    count: int,
    resident: int,
    cost: Costs,
    moved: float,
    work: float,
    rates: Rates = RATES,
    share: float = 1.0,
) -> Modelled:
    """The bounds of a launch of ``count`` programs, and its modelled time.

    ``moved``: bytes through DRAM. ``work``: FLOPs of its matrix products, without padding. ``share``: see
    `counts.average_share`.
    """
    clocks = {
        "tensor": cost.tensor * DENSE_FLOPS * rates.clock * rates.processors / rates.tensor,
        "issue": max(cost.issued / 4, cost.alu / 2, 2 * cost.slow),
        "shared": cost.shared,
        "port": (cost.read + cost.written) / rates.port,
    }
    slots = rates.processors * resident
    full, rest = divmod(count, slots)
    each = full * resident + math.ceil(rest / rates.processors)  # programs of the busiest processor
    bounds = {name: each * taken / rates.clock for name, taken in clocks.items()}
    bounds["chain"] = math.ceil(count / slots) * cost.chain / rates.clock
    bounds["dram"] = moved / rates.dram
    bounds["l2"] = count * share * (cost.read + cost.written) / rates.l2
    seconds = sum(each**OVERLAP for each in bounds.values()) ** (1 / OVERLAP) + rates.launch
    limit = max(bounds["dram"], work / rates.tensor)
    microseconds = {name: 1e6 * value for name, value in bounds.items()}
    return Modelled(kernel, shape, count, resident, count / slots, microseconds, 1e6 * limit, 1e6 * seconds)


def model_operator(step: Operator, rates: Rates = RATES) -> Modelled:
    """One of PyTorch's operators: its bytes through DRAM."""
    needed = 1e6 * (step.read + step.written) / rates.dram
    return Modelled(f"aten::{step.name}", "", 0, 0, 0.0, {"dram": needed}, needed, needed + 1e6 * rates.launch)


def model_recording(name: str, recording: Recording, rates: Rates = RATES) -> ModelledPass:
    """Every step of a recording; compiles its kernels for sm_90, unless Triton's cache holds them."""
    own = first_writes(recording)
    specialised = [specialise(launch, TARGET) for launch in recording.launches]
    distinct = {each.key: each for each in specialised}
    made = dict(zip(distinct, analyse_all(list(distinct.values())), strict=True))
    keys = iter(specialised)
    found = []
    for step in recording.steps:
        if isinstance(step, Operator):
            found.append(model_operator(step, rates))
            continue
        kernel = next(keys)
        compiled = made[kernel.key]
        resident = CHIP_OF[TARGET].programs_resident(compiled.registers, compiled.shared, compiled.num_warps)
        moved = sum(traffic(step, compiled, own[id(step)]))
        cost = launch_costs(kernel, step, resident)
        work = 0 if step.name.startswith("dwconv") else flops(step, compiled) or 0
        sizes = shape_of(step), programs(step), resident
        found.append(model_launch(step.name, *sizes, cost, moved, work, rates, average_share(step)))
    return ModelledPass(name, found)


def model_pass(name: str, rates: Rates = RATES) -> ModelledPass:
    """One of ``PASSES``."""
    return model_recording(name, record(VARIANT, **PASSES[name]), rates)


def shape_of(launch: Launch) -> str:
    """Channels and hidden units (outputs) of a launch; for a depthwise convolution, the image's sides and channels."""
    given = launch.arguments
    if launch.name.startswith("dwconv") and "x_ptr" in given:
        return "×".join(map(str, given["x_ptr"].shape[1:]))
    return "×".join(str(given[name]) for name in ("C", "K", "N") if name in given)


_known: dict[str, Costs] = {}


def launch_costs(kernel: Specialised, launch: Launch, resident: int) -> Costs:
    """`program_costs.costs` of a launch, kept beside Triton's machine code."""
    chip = CHIP_OF[TARGET]
    sizes = {k: v for k, v in launch.arguments.items() if not isinstance(v, Buffer)}
    key = repr((kernel.key, launch.grid, sorted(sizes.items(), key=lambda item: item[0])))
    if key in _known:
        return _known[key]
    compiled = triton.compile(kernel.source(), target=kernel.gpu, options=kernel.options)
    digest = hashlib.sha256(f"{compiled.hash}{key}{_version()}".encode()).hexdigest()
    store = get_cache_manager(digest)
    path = store.get_file("costs.json")
    if path is None:
        cache = 256 * 1024 // resident - compiled.metadata.shared
        listing = _cuobjdump(compiled.asm["cubin"], "-sass")
        found = costs(kernel, launch, listing, chip.lanes * compiled.metadata.num_warps, cache)
        path = store.put(json.dumps(dataclasses.asdict(found)), "costs.json", binary=False)
    _known[key] = Costs(**json.loads(Path(path).read_text()))
    return _known[key]


@functools.cache
def _version() -> str:
    folder = Path(__file__).parent
    names = ("sass.py", "threads.py", "meanings.py", "walking.py", "program_costs.py")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
