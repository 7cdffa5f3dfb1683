"""How time and memory grow with batch, resolution and depth, and what changing sizes from step to step costs."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench.timing import WrongResult, failure
from bench.variants import RECIPES, Cell, Subject
from convnext_fast.measuring import relative_error, seconds

AXES = ("batch", "side", "depth")
ALTERNATING = ("eager channels_last", "fused")


def cells(quick: bool, on_cpu: bool) -> dict[str, list[Cell]]:
    """For each of ``AXES``, training cells of growing size."""
    variant = "atto" if on_cpu else "tiny"
    dtype = "float32" if on_cpu else "bfloat16"
    batches = (1, 2, 4, 8) if on_cpu else (8, 32, 64, 128, 256)
    sides = (96, 160, 224, 320) if quick else (96, 160, 224, 384, 512, 768, 1024)
    batch = 1 if on_cpu else 8
    depths = [(2, 2, d, 2) for d in (6, 12, 18)] if on_cpu else [(3, 3, d, 3) for d in (9, 18, 27)]
    return {
        "batch": [Cell(variant, n, 224, dtype, "training") for n in batches],
        "side": [Cell(variant, batch, side, dtype, "training") for side in sides],
        "depth": [Cell(variant, batch, 224, dtype, "training", depth) for depth in depths],
    }


def size(axis: str, cell: Cell) -> int:
    """The size in which time and memory should be linear: images, pixels of an image, or blocks."""
    return {"batch": cell.batch, "side": cell.side**2, "depth": sum(cell.depths or ())}[axis]


def deviation(points: Sequence[tuple[float, float]]) -> float | None:
    """The largest relative distance of (size, value) points from the line through the first and the last of them."""
    if len(points) < 3:
        return None
    points = sorted(points)
    (x0, y0), (x1, y1) = points[0], points[-1]
    return max(abs(y / (y0 + (y1 - y0) * (x - x0) / (x1 - x0)) - 1) for x, y in points[1:-1])


def alternating(name: str, device: torch.device, on_cpu: bool) -> dict[str, Any]:
    """Steps of inference whose batch and resolution change each time, compared with the same steps sorted by size.

    Returns the seconds of one step of every size together (medians) in both orders, their ratio, those of the first
    steps, and the error.
    """
    variant, dtype = ("atto", "float32") if on_cpu else ("tiny", "bfloat16")
    batches = (1, 2, 3, 4) if on_cpu else (16, 24, 32, 48)
    shapes = list(itertools.product(batches, (160, 192, 224)))
    subject = Subject(Cell(variant, max(batches), 224, dtype, "inference"), device)
    layout = torch.channels_last if RECIPES[name].channels_last else torch.contiguous_format
    model = subject.model(RECIPES[name].fused).to(memory_format=layout)
    plain = subject.model(fused=False)
    images = {(n, side): subject.images[0][:n, :, :side, :side].contiguous(memory_format=layout) for n, side in shapes}
    with torch.inference_mode():
        first = sum(seconds([lambda image=image: model(image)], device) for image in images.values())
        error = max(relative_error(model(image), plain(image)) for image in images.values())
        bound = 2 * subject.reference.bounds[0]  # two results, each within the bound of float64
        if not error <= bound:
            raise WrongResult(f"relative error {error:.1e} against eager is over {bound:.1e}")
        taken: dict[str, dict[tuple[int, int], list[float]]] = {"fixed": {}, "mixed": {}}
        generator = random.Random(0)
        for _ in range(3):
            mixed = shapes * 2
            generator.shuffle(mixed)
            for order, sequence in (("fixed", sorted(shapes * 2)), ("mixed", mixed)):
                for shape in sequence:
                    took = seconds([lambda image=images[shape]: model(image)], device)
                    taken[order].setdefault(shape, []).append(took)
    fixed, mixed_s = (sum(statistics.median(times) for times in taken[order].values()) for order in taken)
    return {"fixed_s": fixed, "mixed_s": mixed_s, "ratio": mixed_s / fixed, "first_s": first, "error": error}


def alternating_rows(device: torch.device, on_cpu: bool) -> Iterator[dict[str, Any]]:
    """A row for each of ``ALTERNATING``."""
    for name in ALTERNATING:
        row = {"key": f"alternating/{name}", "section": "alternating", "contender": name, "failure": None}
        try:
            yield row | alternating(name, device, on_cpu)
        except Exception as error:
            yield row | {"failure": failure(error)}
