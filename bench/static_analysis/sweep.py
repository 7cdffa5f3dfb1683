"""Compile every launch of the models once for each target, and check what is required of the machine code.

    kernels = collect(passes(("tiny", "base"), ("bf16",), ("inference", "training"), (0, 1, 2), TARGETS))
    for kernel, made in zip(kernels, analyse_all([each.specialised for each in kernels])):
        print(made, faults(kernel, made))

Recording a pass takes half a second, compiling a kernel a few seconds. Passes share kernels: a kernel is compiled where
it occurs first, and Triton's cache keeps it for the next process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from bench.static_analysis.analysis import Compiled
from bench.static_analysis.chips import CHIP_OF
from bench.static_analysis.compilation import Launch, Specialised
from bench.static_analysis.counts import first_writes
from bench.static_analysis.recording import Buffer, record, unique

# Parameters and images in the dtype; "autocast-…": in float32, under autocast.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "autocast-bf16": torch.bfloat16,
    "autocast-fp16": torch.float16,
}

# Allowed reads of activations narrower than 16 bytes, by kernel, argument and, for some, channels, with the reasons.
NARROW = {
    ("_stem_kernel", "image_ptr"): 8,  # a row of a 4×4 patch of one channel has 4 pixels
    ("_stem_bwd_kernel", "image_ptr"): 4,  # the same row, spread over more threads
    ("dwconv_wgrad_tensor_core_kernel", "du_ptr"): 8,  # 8 channels per program, 1 per warp: half a sector per thread
    ("_weight_kernel", "u_ptr", 80): 8,  # without warp groups: parts of 16 channels; 32 rows of them would spill
    ("_weight_kernel", "dz_ptr", 80): 8,
    # With a global response norm; 64 rows would spill. A row of the last part, 32 channels, is whole sectors. 4 warps
    # with half the hidden units would read it by 16 bytes, but take 1.3 times as long in the resource model.
    ("_weight_kernel", "u_ptr", 160): 8,
    ("_weight_kernel", "dz_ptr", 160): 8,
}


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of a model for a target, as `record` takes it; ``dtype`` is a name of ``DTYPES``."""

    variant: str
    dtype: str
    mode: str
    recompute: int
    target: str
    drop_path: float = 0.0

    def __str__(self) -> str:
        level = f", recompute {self.recompute}" if self.mode == "training" else ""
        dropping = f", drop path {self.drop_path}" if self.drop_path else ""
        return f"{self.variant}, {self.dtype}, {self.mode}{level}{dropping}, {self.target}"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that Triton compiles, and the pass that launches it first, with its launches there.

    ``own`` is `first_writes` of the first launch.
    """

    specialised: Specialised
    launches: list[Launch]
    own: frozenset[int]
    first: Pass


def passes(
    variants: Iterable[str],
    dtypes: Iterable[str],
    modes: Iterable[str],
    levels: Iterable[int],
    targets: Iterable[str],
    drop_paths: Iterable[float] = (0.0,),
) -> list[Pass]:
    """All combinations in the given order, dtypes outermost and targets innermost; inference has one level."""
    variants, modes, levels, targets = list(variants), list(modes), list(levels), list(targets)
    inference = [("inference", 1, 0.0)]
    training = [("training", level, rate) for rate in drop_paths for level in levels]
    return [
        Pass(variant, dtype, mode, level, target, rate)
        for dtype in dtypes
        for variant in variants
        for chosen in modes
        for mode, level, rate in (inference if chosen == "inference" else training)
        for target in targets
    ]


def collect(chosen: Iterable[Pass], **options: Any) -> Iterator[Kernel]:
    """The kernels of the passes, each once, in order. ``options``: batch, side and shallow of `record`."""
    known: set[str] = set()
    for one in chosen:
        autocast = DTYPES[one.dtype] if one.dtype.startswith("autocast-") else None
        made = record(
            one.variant,
            torch.float32 if autocast else DTYPES[one.dtype],
            mode=one.mode,
            recompute=one.recompute,
            target=one.target,
            drop_path=one.drop_path,
            autocast=autocast,
            **options,
        )
        own = first_writes(made)
        for key, (specialised, launches) in unique(made, one.target).items():
            if key not in known:
                known.add(key)
                yield Kernel(specialised, launches, own[id(launches[0])], one)


def faults(kernel: Kernel, made: Compiled, spills: int = 0) -> list[str]:
    """The requirements that a compiled kernel misses.

    Shared memory must be within the target's limit. In 16 bits also: no spills, warp-group MMA in the large tiles of
    sm_90, activations read by 16 bytes. ``spills``: how many are allowed.
    """
    launch, target = kernel.launches[0], made.target
    limit = CHIP_OF[target].shared_block
    found = []
    if made.shared > limit:
        found.append(f"{made.shared} bytes of shared memory, {target} has {limit}")
    if kernel.first.dtype != "fp32":
        if made.spills > spills:
            found.append(f"{made.spills} spills")
        if target == "sm_90" and large_tile(launch) and made.matrix != ["HGMMA"]:
            found.append(f"multiplies with {made.matrix}, not with warp groups")
        found += narrow_reads(launch, made)
    return found


def large_tile(launch: Launch) -> bool:
    """Whether a kernel multiplies matrices in tiles of at least 64 × 64."""
    given = launch.arguments
    rows = given.get("BLOCK_M", 0)
    columns = given["PARTS"][0][1] if "PARTS" in given else given.get("BLOCK_N", 0)
    return "PRECISION" in given and rows >= 64 and columns >= 64


def narrow_reads(launch: Launch, made: Compiled) -> Iterator[str]:
    """Loads of activations (16-bit tensors not much smaller than the largest one) by less than 16 bytes."""
    if launch.name.startswith(("_fold", "_grn_factors")):
        return  # these kernels read weights only
    tensors = {k: v for k, v in launch.arguments.items() if isinstance(v, Buffer) and v.dtype.itemsize == 2}
    large = max((tensor.numel() for tensor in tensors.values()), default=0) // 8
    for name, widths in made.read.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.numel() < large or tensor.shape[-1] % 8:
            continue
        key = made.kernel, name
        if min(widths) < NARROW.get((*key, launch.arguments.get("C")), NARROW.get(key, 16)):
            yield f"reads {name} {tensor.shape} by {sorted(widths)} bytes"


def describe(kernel: Kernel) -> str:
    """Name and integer arguments of the first launch, and its pass."""
    given = kernel.launches[0].arguments
    sizes = {k: v for k, v in given.items() if isinstance(v, int) and not isinstance(v, bool)}
    return f"{kernel.launches[0].name} {sizes} ({kernel.first})"
