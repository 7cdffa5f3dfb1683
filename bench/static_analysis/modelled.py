"""Rows of a study that are not timed: the resource model's figures of whole passes on an H200."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

from bench.static_analysis.resource_model import MEASURED, PASSES, ModelledPass, model_pass
from bench.timing import failure

KEPT = ("kernel", "shape", "programs", "resident", "waves", "limit", "microseconds", "bounds")
"""The fields of `resource_model.Modelled` that a row keeps."""


def rows() -> Iterator[dict[str, Any]]:
    """A row for each of ``resource_model.PASSES``."""
    return map(row, PASSES)


def row(name: str) -> dict[str, Any]:
    """The row of a pass: its modelled milliseconds, its limit, and every kind of launch."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    head = {"key": f"modelled/{name}", "section": "modelled", "pass": name}
    try:
        return head | {"failure": None, **figures(model_pass(name))}
    except Exception as error:
        return head | {"failure": failure(error)}


def figures(made: ModelledPass) -> dict[str, Any]:
    """The figures of a pass; "places" are the positions of each kind of launch in the pass."""
    kinds = [
        {name: value for name, value in dataclasses.asdict(each).items() if name in KEPT} | {"places": places}
        for each, places in made.kinds()
    ]
    return {
        "modelled_ms": made.milliseconds,
        "limit_ms": made.limit,
        "earlier_ms": MEASURED.get(made.name),
        "launches": len(made.launches),
        "kinds": kinds,
    }
