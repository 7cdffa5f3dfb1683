"""Counts of a whole pass: DRAM bytes, launches, FLOPs and saved bytes, beside the peers' and the budgets.

All figures are counted, none measured. DRAM bytes of a launch are the bytes of the tensors that its machine code reads
and of those that it writes, each byte once: the traffic that is left if a cache holds the launch's working set.
Each of PyTorch's own operators counts as one launch, and its tensors are counted in the same way.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from bench.static_analysis.analysis import Compiled, analyse_all
from bench.static_analysis.compilation import Launch
from bench.static_analysis.recording import Buffer, Operator, Recording, record, specialise, unique, unique_bytes

TARGET = "sm_90"
COUNTED = (("inference", None), ("training", 0), ("training", 1), ("training", 2))
"""(mode, recompute level) of the passes that are counted."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """MB per image and launches of peers' ConvNeXt-T at 224², bf16, batch 128, each as (least, most).

    Counted from eager's operators (timm), and from the code that Inductor generates for an H100.
    """

    name: str
    forward: tuple[float, float]
    step: tuple[float, float]
    saved: float
    forward_launches: tuple[int, int]
    step_launches: tuple[int, int]


PEERS = (
    Peer("eager (timm)", (122, 122), (356, 388), 54.7, (138, 160), (390, 480)),
    Peer("torch.compile", (112, 112), (367, 381), 54.7, (118, 118), (521, 555)),
    Peer("max-autotune, bound", (70, 70), (310, 310), 54.7, (86, 86), (460, 460)),
)
BUDGETS: dict[tuple[str, int | None], dict[str, float]] = {
    ("inference", None): {"megabytes": 37, "launches": 60},
    ("training", 0): {},
    ("training", 1): {"megabytes": 150, "launches": 260, "saved": 11},
    ("training", 2): {"megabytes": 150, "launches": 260, "saved": 7},
}
V2_BUDGETS: dict[tuple[str, int | None], dict[str, float]] = {
    ("inference", None): {"megabytes": 60, "launches": 75},
    ("training", 1): {"megabytes": 190, "saved": 12},
}


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of a pass: launches and how many are ours; per image: MB to and from DRAM, GFLOPs, MB saved.

    ``gflops`` are twice the multiply-adds of matrix products and convolutions, recomputation included. ``uncounted``
    names kernels that multiply matrices but have no formula in `flops`.
    """

    megabytes: float
    launches: int
    own_launches: int
    gflops: float
    saved: float
    uncounted: tuple[str, ...]

    def missed(self, budget: dict[str, float]) -> dict[str, tuple[float, float]]:
        """Budgets that are exceeded: name → (count, budget)."""
        return {name: (getattr(self, name), most) for name, most in budget.items() if getattr(self, name) > most}


def flops(launch: Launch, compiled: Compiled) -> int | None:
    """FLOPs of the products in a launch, without padding and overhang; None if there is no formula.

    Kernels without matrix products or convolutions count 0.
    """
    given, name = launch.arguments, launch.name
    if name.startswith("dwconv_") and not name.endswith("_sum_kernel"):
        return 2 * given["TAPS"] ** 2 * given["x_ptr"].numel()
    if name == "_stem_kernel":
        return 2 * given["out_ptr"].numel() * given["w_ptr"].numel() // given["C"]
    if name == "_stem_bwd_kernel":
        return 2 * 2 * given["dout_ptr"].numel() * given["w_ptr"].numel() // given["C"]
    if name in ("_downsample_kernel", "_downsample_input_kernel", "_downsample_weight_kernel"):
        twice = name == "_downsample_input_kernel" and given["C"] > given["BLOCK_N"]
        return (2 + 2 * twice) * given["P"] * given["w_ptr"].numel()
    saved = given.get("a_ptr") is not None
    products = {
        "_mlp_fwd_kernel": 2,
        "_fc1_kernel": 1,
        "_fc2_kernel": 1,
        "_fc1_tma_kernel": 1,
        "_fc2_tma_kernel": 1,
        "_input_kernel": 2 if saved else 3,
        "_weight_kernel": 3 if saved else 4 + given.get("APART", False),
        "_hidden_grad_kernel": 1 if saved else 2,
        "_input_grad_kernel": 1,
        "_weight_grad_kernel": 2,
        "_grn_sums_kernel": 1 if saved else 2,
    }
    if name in products:
        return products[name] * 2 * given["P"] * given["C"] * given["K"]
    return None if compiled.matrix or "tl.dot(" in launch.kernel.src else 0


def first_writes(recording: Recording) -> dict[int, frozenset[int]]:
    """For each launch, by ``id``: the storages that no earlier step filled, so that it can only read what it wrote."""
    filled = set(recording.given)
    found = {}
    for step in recording.steps:
        if isinstance(step, Operator):
            filled |= step.storages
            continue
        touched = {value.storage for value in step.arguments.values() if isinstance(value, Buffer)}
        found[id(step)] = frozenset(touched - filled)
        filled |= touched
    return found


def traffic(launch: Launch, compiled: Compiled, own: frozenset[int]) -> tuple[int, int]:
    """(bytes read, bytes written) of a launch; ``own``: see `first_writes`."""
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Buffer)}
    if "" in compiled.read or "" in compiled.written:
        # AMD's machine code does not show which argument an access belongs to: each tensor counts once, as read.
        return unique_bytes(tensors.values()), 0
    read = [tensors[name] for name in compiled.read if tensors[name].storage not in own]
    return unique_bytes(read), unique_bytes(tensors[name] for name in compiled.written)


def count(recording: Recording, target: str) -> Counts:
    """Counts of a recorded pass; compiles its kernels for ``target``, unless Triton's cache holds them."""
    kernels = unique(recording, target)
    compiled = dict(zip(kernels, analyse_all([specialised for specialised, _ in kernels.values()]), strict=True))
    own = first_writes(recording)
    total, work, uncounted = 0, 0, set()
    for step in recording.steps:
        if isinstance(step, Operator):
            total += step.read + step.written
            work += step.flops
            continue
        made = compiled[specialise(step, target).key]
        total += sum(traffic(step, made, own[id(step)]))
        amount = flops(step, made)
        if amount is None:
            uncounted.add(step.name)
        work += amount or 0
    return Counts(
        megabytes=total / recording.batch / 1e6,
        launches=len(recording.steps),
        own_launches=len(recording.launches),
        gflops=work / recording.batch / 1e9,
        saved=recording.saved / recording.batch / 1e6,
        uncounted=tuple(sorted(uncounted)),
    )


def count_tiny(mode: str, recompute: int | None, variant: str = "tiny") -> Counts:
    """Counts of ConvNeXt-T, or ``variant``, at 224², bf16, batch 128, for an H100."""
    made = record(variant, torch.bfloat16, mode=mode, recompute=1 if recompute is None else recompute, target=TARGET)
    return count(made, TARGET)


def output_elements(launch: Launch, compiled: Compiled) -> int:
    """Elements of the largest tensor that a launch writes."""
    names = [name for name in compiled.written if name] or launch.arguments
    return max((b.numel() for n in names if isinstance(b := launch.arguments[n], Buffer)), default=0)


def average_share(launch: Launch) -> float:
    """Work of an average program over that of the first: less than 1 where persistent programs share tiles."""
    given = launch.arguments
    if "PROGRAMS" not in given:
        return 1.0
    columns = given["C" if "fc2" in launch.name else "K"]
    tiles = -(-given["P"] // given["BLOCK_M"]) * -(-columns // given["BLOCK_N"])
    return tiles / programs(launch) / -(-tiles // given["PROGRAMS"])


def programs(launch: Launch) -> int:
    """Programs of a launch."""
    return math.prod(launch.grid)
