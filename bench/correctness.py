"""Every fused op on this very device, in every dtype, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import OPS, OpCase, reference_of, results
from bench.environment import DTYPES
from bench.timing import Reference, failure, worst_error

SHAPES = ((2, 9, 7, 40), (1, 14, 14, 96), (1, 7, 7, 384))
STEM_SHAPES = ((2, 36, 28, 3), (1, 64, 64, 3))
HUGE_OPS = ("dwconv_layernorm", "convnext_block")
HUGE_MEMORY = 40 << 30
"""Free bytes that the cases of 2³¹ elements ask for: they hold x and three tensors of its size, in bfloat16."""


def cases(device: torch.device) -> list[OpCase]:
    """What is checked. float64 on an accelerator is the reference itself."""
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
        yield _row("against float64", case, lambda case=case: _against_float64(case, device))
        yield _row("same bits twice", case, lambda case=case: _deterministic(case, device))
        if device.type == "cuda":
            yield _row("CUDA graph replay", case, lambda case=case: _replayed(case, device))
    if device.type != "cuda":
        yield _not_run("CUDA graph replay", "all", "needs a CUDA device")
    yield from _huge(device)


def _row(check: str, case: OpCase, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
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
        return row | run()
    except Exception as error:
        return row | {"passed": False, "failure": failure(error)}


def _not_run(check: str, op: str, why: str) -> dict[str, Any]:
    key = f"correctness/{check}/{op}"
    return {"key": key, "section": "correctness", "check": check, "op": op, "passed": None, "failure": why}


def _against_float64(case: OpCase, device: torch.device) -> dict[str, Any]:
    inputs = case.inputs(device)
    reference = reference_of(case, inputs)
    error = worst_error(results(case, case.form(True), inputs), reference.expected)
    return {"passed": error <= reference.bound, "error": error, "error_bound": reference.bound}


def _deterministic(case: OpCase, device: torch.device) -> dict[str, Any]:
    inputs = case.inputs(device)
    first, second = (results(case, case.form(True), inputs) for _ in range(2))
    return {"passed": all(torch.equal(a, b) for a, b in zip(first, second, strict=True))}


def _replayed(case: OpCase, device: torch.device) -> dict[str, Any]:
    """A forward captured on zeros, replayed on the inputs, gives the bits of a plain call."""
    from bench.variants import captured

    inputs = case.inputs(device)
    with torch.no_grad():
        expected = case.form(True)(*inputs)
        replay = captured(lambda x: case.form(True)(x, *inputs[1:]), torch.zeros_like(inputs[0]), lambda: None)
        return {"passed": torch.equal(replay(inputs[0]), expected)}


def _huge(device: torch.device) -> Iterator[dict[str, Any]]:
    """x of more than 2³¹ elements: the last image is right, which it is not where an offset overflows."""
    check = "2³¹ elements"
    if device.type != "cuda":
        yield _not_run(check, "all", "needs a CUDA device")
        return
    free = torch.cuda.mem_get_info(device)[0]
    if free < HUGE_MEMORY:
        yield _not_run(check, "all", f"needs {HUGE_MEMORY >> 30} GiB of free memory, found {free >> 30}")
        return
    images = 2**31 // (56 * 56 * 96) + 2
    for op in HUGE_OPS:
        case = OpCase(op, (images, 56, 56, 96), "bfloat16", "forward")
        yield _row(check, case, lambda case=case: _last_image(case, device))
        torch.cuda.empty_cache()


def _last_image(case: OpCase, device: torch.device) -> dict[str, Any]:
    last = OpCase(case.op, (1, *case.shape[1:]), case.dtype, case.mode)
    small = last.inputs(device)
    x = torch.zeros(case.shape, device=device, dtype=DTYPES[case.dtype])
    x[-1] = small[0][0]
    reference: Reference = reference_of(last, small)
    with torch.no_grad():
        out: Tensor = case.form(True)(x, *small[1:])
    error = worst_error([out[-1:]], reference.expected)
    return {"passed": error <= reference.bound, "error": error, "error_bound": reference.bound}
