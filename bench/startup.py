"""Start-up: the time of the import after PyTorch's, and of each op's first and later calls.

``python -m bench.startup DEVICE`` prints the calls of this process as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from bench.cases import OPS, OpCase, results
from bench.environment import ROOT
from bench.timing import failure
from convnext_fast.measuring import seconds

LIMIT = 0.3
"""Seconds that ``import convnext_fast`` may take on top of ``import torch``."""
_IMPORT = """
import time, torch
begun = time.perf_counter()
import convnext_fast
print(time.perf_counter() - begun)
"""


def import_seconds(rounds: int = 3) -> list[float]:
    """Seconds of ``import convnext_fast`` after ``import torch``, each in a process of its own."""
    return [float(_python("-c", _IMPORT)) for _ in range(rounds)]


def calls(device: torch.device) -> dict[str, dict[str, float]]:
    """For each op, seconds of the first forward and backward of this process, and of later ones."""
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    found = {}
    for op in OPS:
        case = OpCase(op, (1, 56, 56, 96) if op != "patchify_stem" else (1, 224, 224, 3), dtype, "both")
        inputs = case.inputs(device)
        call = functools.partial(results, case, case.form(True), inputs)
        taken = [seconds([call], device) for _ in range(6)]
        found[op] = {"first_call_s": taken[0], "cached_call_s": statistics.median(taken[1:])}
    return found


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for the import, and one for each op: in new processes, without compiled kernels on disk and with them."""
    row: dict[str, Any] = {"key": "startup/import", "section": "startup", "what": "import convnext_fast"}
    try:
        taken = statistics.median(import_seconds())
        yield row | {"first_call_s": taken, "limit_s": LIMIT, "passed": taken < LIMIT, "failure": None}
        with tempfile.TemporaryDirectory() as folder:
            fresh, again = (
                json.loads(_python("-m", "bench.startup", str(device), TRITON_CACHE_DIR=folder, XDG_CACHE_HOME=folder))
                for _ in range(2)
            )
    except (subprocess.CalledProcessError, json.JSONDecodeError) as error:
        yield row | {"failure": failure(error)}
        return
    for op, found in fresh.items():
        figures = found | {"first_call_compiled_s": again[op]["first_call_s"]}
        yield {"key": f"startup/{op}", "section": "startup", "what": op, "failure": None} | figures


def _python(*arguments: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout


if __name__ == "__main__":
    print(json.dumps(calls(torch.device(sys.argv[1]))))
