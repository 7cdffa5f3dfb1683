"""Whole ConvNeXts, inference and training."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import default_device

from bench.plan import work_of
from bench.variants import Cell, Subject, contenders, prepare


def _cells(full: bool, on_cpu: bool) -> list[tuple[Cell, str]]:
    dtype = "float32" if on_cpu else "bfloat16"
    if full:
        sizes = (1, 8) if on_cpu else (1, 32, 128)
        cells = [Cell(v, n, 224, dtype, m) for v in ("tiny", "base") for m in ("inference", "training") for n in sizes]
    elif on_cpu:
        cells = [Cell("atto", 1, 224, dtype, "inference"), Cell("atto", 1, 224, dtype, "training")]
    else:
        cells = [Cell("tiny", 64, 224, dtype, "inference"), Cell("tiny", 32, 224, dtype, "training")]
    return [
        (cell, name)
        for cell in cells
        for name in contenders(cell.mode, default_device(), quick=not full)
        if full or not on_cpu or cell.mode == "inference" or name != "compile"
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each model, size, mode and contender."""
    chosen = _cells(metafunc.config.getoption("--full"), default_device().type == "cpu")
    ids = [f"{c.variant}-{c.batch}x{c.side}-{c.dtype}-{c.mode}-{name}" for c, name in chosen]
    metafunc.parametrize(("cell", "name"), chosen, ids=ids)


def test_model(cell, name, record, device, request):
    """Measure one contender."""
    names = tuple(
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "callspec", None) and item.callspec.params.get("cell") == cell
    )
    key = f"{cell.variant}, {cell.batch} × {cell.side}², {cell.dtype}, {cell.mode}"
    record(key, name, dataclasses.asdict(cell), lambda: prepare(names, Subject(cell, device)), work_of(cell))
