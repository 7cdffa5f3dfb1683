"""Check every fused op on this device, in every dtype, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.cases import OPS, OpCase, reference_of, results
from bench.environment import DTYPES
from bench.timing import failure
from bench.variants import captured

SHAPES = ((2, 9, 7, 40), (1, 14, 14, 96), (1, 7, 7, 384))
STEM_SHAPES = ((2, 36, 28, 3), (1, 64, 64, 3))
REPLAY, HUGE = "CUDA graph replay", "2³¹ elements"
OFTEN = "same bits ten times"
OFTEN_SHAPES = ((1, 56, 56, 96), (2, 28, 28, 192), (64, 33, 33, 96))
"""Heights that the convolution cuts into segments, some unevenly: late copies once met a store's scratch buffer."""
HUGE_OPS = ("dwconv_layernorm", "convnext_block")
HUGE_MEMORY = 40 << 30
"""Free bytes that the cases of 2³¹ elements need: they hold x and three tensors of its size, in bfloat16."""


def cases(device: torch.device) -> list[OpCase]:
    """The cases to check. On an accelerator float64 is left out: it is the reference itself."""
    dtypes = [name for name in DTYPES if device.type == "cpu" or name != "float64"]
    return [
        OpCase(op, shape, dtype, "both")
        for op in OPS
        for dtype in dtypes
        for shape in (STEM_SHAPES if op == "patchify_stem" else SHAPES)
    ]


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each check: "passed" is True or False, or None with the reason in "failure" where it could not run."""
    for case in cases(device):
        for check in CHECKS:
            if check != REPLAY or device.type == "cuda":
                yield row_of(check, case, device)
    if device.type != "cuda":
        yield _not_run(REPLAY)
    else:
        for shape in OFTEN_SHAPES:
            for dtype in ("bfloat16", "float16"):
                yield row_of(OFTEN, OpCase("dwconv_layernorm", shape, dtype, "both"), device)
    yield from huge_rows(device)


def row_of(check: str, case: OpCase, device: torch.device) -> dict[str, Any]:
    """The row of ``HUGE``, ``OFTEN`` or one of ``CHECKS`` on one op."""
    row = {
        "key": f"correctness/{check}/{case.name}",
        "section": "correctness",
        "check": check,
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "mode": case.mode,
        "failure": None,
    }
    try:
        return row | ({HUGE: _last_image, OFTEN: _often_the_same} | CHECKS)[check](case, device)
    except Exception as error:
        return row | {"passed": False, "failure": failure(error)}


def _not_run(check: str, why: str = "needs a CUDA device") -> dict[str, Any]:
    return {"key": f"correctness/{check}", "section": "correctness", "check": check, "passed": None, "failure": why}


def _against_float64(case: OpCase, device: torch.device) -> dict[str, Any]:
    inputs = case.inputs(device)
    reference = reference_of(case, inputs)
    error, bound = reference.worst(results(case, case.form(True), inputs))
    return {"passed": error <= bound, "error": error, "error_bound": bound}


def _deterministic(case: OpCase, device: torch.device, runs: int = 4) -> dict[str, Any]:
    """All runs give the same bits. On a GPU the first is recorded, and the later ones are replayed."""
    inputs = case.inputs(device)
    first, *others = (results(case, case.form(True), inputs) for _ in range(runs))
    return {"passed": all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))}


def _often_the_same(case: OpCase, device: torch.device) -> dict[str, Any]:
    return _deterministic(case, device, 10)


def _replayed(case: OpCase, device: torch.device) -> dict[str, Any]:
    """A forward is captured on zeros and replayed on the inputs: it gives the bits of a plain call."""
    inputs = case.inputs(device)
    with torch.no_grad():
        expected = case.form(True)(*inputs)
        replay = captured(lambda x: case.form(True)(x, *inputs[1:]), torch.zeros_like(inputs[0]), lambda: None)
        return {"passed": torch.equal(replay(inputs[0]), expected)}


def huge_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """Check the last image of an x with more than 2³¹ elements: it is wrong if an offset overflows."""
    if device.type != "cuda":
        yield _not_run(HUGE)
        return
    free = torch.cuda.mem_get_info(device)[0]
    if free < HUGE_MEMORY:
        yield _not_run(HUGE, f"needs {HUGE_MEMORY >> 30} GiB of free memory, found {free >> 30}")
        return
    images = 2**31 // (56 * 56 * 96) + 2
    for op in HUGE_OPS:
        yield row_of(HUGE, OpCase(op, (images, 56, 56, 96), "bfloat16", "forward"), device)
        torch.cuda.empty_cache()


def _last_image(case: OpCase, device: torch.device) -> dict[str, Any]:
    last = OpCase(case.op, (1, *case.shape[1:]), case.dtype, case.mode)
    small = last.inputs(device)
    x = torch.zeros(case.shape, device=device, dtype=DTYPES[case.dtype])
    x[-1] = small[0][0]
    with torch.no_grad():
        out = case.form(True)(x, *small[1:])
    error, bound = reference_of(last, small).worst([out[-1:]])
    return {"passed": error <= bound, "error": error, "error_bound": bound}


CHECKS = {"against float64": _against_float64, "same bits four times": _deterministic, REPLAY: _replayed}
