"""What the tests of ``bench/`` share: measurements that are true, but of tiny work."""

from __future__ import annotations

import torch

from bench import environment, variants
from bench.plan import Study
from bench.results import Results
from bench.variants import Cell

CPU = torch.device("cpu")
ROOFLINE = environment.Roofline({"float32": 1e12}, 1e11, "made up")
STUDY = Study(CPU, lambda: ROOFLINE, quick=True, budget=0.05)
NAMES = ("eager", "eager channels_last", "fused")


def tiny_cell(mode: str, batch: int = 2) -> Cell:
    """One block a stage, 32² pixels."""
    return Cell("atto", batch, 32, "float32", mode, depths=(1, 1, 1, 1))


def measured_rows(mode: str, batch: int, names: tuple[str, ...] = NAMES, **more: variants.Contender) -> list[dict]:
    """Rows of the section "models"; ``more`` are further contenders."""
    cell = tiny_cell(mode, batch)
    contenders = variants.prepare(names, variants.Subject(cell, CPU)) | more
    return list(STUDY.model_rows(cell, tuple(contenders), lambda: contenders))


def stored(folder, rows) -> Results:
    """The rows in a file, as a study writes them."""
    results = Results(folder, environment.facts(CPU))
    results.add(*rows)
    return results
