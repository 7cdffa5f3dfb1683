"""The steps of a study, in order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bench import cases, correctness, scaling, startup, variants
from bench.environment import DTYPES, Roofline
from bench.results import Results
from bench.static_analysis import modelled
from bench.timing import Contender, Measured, failure, measure, rates
from bench.variants import Cell, Subject
from bench.work import Work, model_work

SECTIONS = ("correctness", "models", "stages", "scaling", "alternating", "startup", "modelled")
LONGEST_CALL = 10.0
"""Seconds by the roofline. Work that takes longer is not run, and its row says so."""
# Batches of the quick study: for a CPU, and for an accelerator.
_QUICK_BATCHES = {
    True: {"inference": (1, 8), "training": (8,)},
    False: {"inference": (1, 128), "training": (64,)},
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a study: its section, a title, the keys of its rows if known, and the function that makes the rows.

    If ``keys`` is empty, a last row of section "finished" marks the step as done.
    """

    section: str
    title: str
    keys: tuple[str, ...]
    run: Callable[[], Iterable[dict[str, Any]]]

    def finished(self, results: Results) -> bool:
        """Whether all rows are in the results."""
        return all(key in results for key in self.keys or (f"{self.section}/finished",))

    def belongs_to(self, part: str) -> bool:
        """Whether ``part`` is the section or the beginning of a key."""
        return part == self.section or any(key.startswith(part) for key in self.keys)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows and, without ``keys``, the last row that marks the step as done."""
        yield from self.run()
        if not self.keys:
            yield {"key": f"{self.section}/finished", "section": "finished", "failure": None}


@dataclasses.dataclass(frozen=True)
class Study:
    """What every step needs to know.

    Attributes:
        device: what is measured.
        roofline: returns the rates that times are compared with; called once there is a time.
        quick: whether to measure few sizes only.
        budget: approximate seconds of sampling for each contender.
    """

    device: torch.device
    roofline: Callable[[], Roofline]
    quick: bool
    budget: float

    @property
    def on_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.device.type == "cpu"

    @property
    def dtype(self) -> str:
        """The dtype of most rows."""
        return "float32" if self.on_cpu else "bfloat16"

    def steps(self, only: tuple[str, ...] = ()) -> list[Step]:
        """The plan, correctness first. ``only`` selects parts: sections, or the beginnings of rows' keys.

        On an accelerator a quick study has correctness and models only: `bench.gpu_day` measures the rest.

        Raises:
            ValueError: a part is not in the plan.
        """
        device = self.device
        plan = [
            Step("correctness", "every op on this device", (), lambda: correctness.rows(device)),
            *(self._models(cell) for cell in self._cells()),
        ]
        if self.on_cpu or not self.quick:
            plan += [
                *(self._stage(case) for case in self._stage_cases()),
                *(self._axis(axis, found) for axis, found in scaling.cells(self.quick, self.on_cpu).items()),
                Step("alternating", "sizes that change", (), lambda: scaling.alternating_rows(device, self.on_cpu)),
                Step("startup", "import and first calls", (), lambda: startup.rows(device)),
            ]
        if not self.quick:
            plan.append(Step("modelled", "modelled figures", (), modelled.rows))
        for part in only:
            if not any(step.belongs_to(part) for step in plan):
                raise ValueError(
                    f"no part of the study is called {part!r}: expected {', '.join(SECTIONS)} or a key's start"
                )
        return [step for step in plan if not only or any(step.belongs_to(part) for part in only)]

    def _cells(self) -> list[Cell]:
        if self.quick:
            sizes = _QUICK_BATCHES[self.on_cpu]
            return [Cell("tiny", n, 224, self.dtype, mode) for mode, batches in sizes.items() for n in batches]
        grid = [
            Cell(variant, batch, 224, self.dtype, mode)
            for variant in ("tiny", "small", "base", "large", "v2_tiny")
            for mode in ("inference", "training")
            for batch in (1, 4, 8, 16, 32, 64, 128, 256)
        ]
        if self.on_cpu:
            return grid
        others = [Cell("tiny", 64, 224, d, m) for d in ("float32", "float16") for m in ("inference", "training")]
        return grid + others

    def _stage_cases(self) -> list[cases.OpCase]:
        shapes = cases.stage_shapes("tiny", 1 if self.on_cpu else 64)
        return [cases.OpCase("convnext_block", s, self.dtype, mode) for mode in ("forward", "both") for s in shapes]

    def _models(self, cell: Cell) -> Step:
        """All contenders of a cell."""
        names = variants.contenders(cell.mode, self.device, self.quick)
        keys = tuple(f"{_key('models', cell)}/{name}" for name in names)
        title = f"{cell.variant}, {cell.mode}, {cell.batch} × {cell.side}², {cell.dtype}"
        prepare = functools.partial(self._subject_contenders, names, cell)
        return Step("models", title, keys, lambda: self.model_rows(cell, names, prepare))

    def _subject_contenders(self, names: tuple[str, ...], cell: Cell) -> dict[str, Contender]:
        return variants.prepare(names, Subject(cell, self.device))

    def model_rows(
        self, cell: Cell, names: tuple[str, ...], prepare: Callable[[], dict[str, Contender]]
    ) -> Iterator[dict[str, Any]]:
        """A row of section "models" for each of ``names``; ``prepare`` returns these contenders."""
        for name, figures, _ in self._checked_time(names, prepare, work_of(cell), cell.dtype):
            yield self._model_row("models", cell, f"{_key('models', cell)}/{name}", name, figures)

    def _axis(self, axis: str, cells: list[Cell]) -> Step:
        """The fused model at every size of an axis; on a CPU the sizes are timed alternately."""
        name = "fused"
        keys = {_key(f"scaling/{axis}", cell): cell for cell in cells}

        def prepare() -> dict[str, Contender]:
            return {key: self._subject_contenders((name,), cell)[name] for key, cell in keys.items()}

        def run() -> Iterator[dict[str, Any]]:
            largest = max((work_of(cell) for cell in cells), key=lambda work: work.flops)
            for key, figures, _ in self._checked_time(tuple(keys), prepare, largest, self.dtype):
                row = self._model_row("scaling", keys[key], f"{key}/{name}", name, figures)
                yield row | {"axis": axis, "size": scaling.size(axis, keys[key])}

        return Step("scaling", f"along {axis}", tuple(f"{key}/{name}" for key in keys), run)

    def _stage(self, case: cases.OpCase) -> Step:
        """All contenders for one op."""
        names = tuple(name for name in cases.CONTENDERS if not (self.quick and name == "compile"))
        keys = {name: f"stages/{case.name}/{name}" for name in names}

        def run() -> Iterator[dict[str, Any]]:
            base = {"section": "stages", **dataclasses.asdict(case), "quick": self.quick}
            prepare = functools.partial(cases.prepare, names, case, self.device)
            for name, figures, _ in self._checked_time(names, prepare, case.work, case.dtype):
                yield base | {"key": keys[name], "contender": name} | self._with_rates(figures, case.work, case.dtype)

        return Step("stages", f"block, {case.mode}, {'×'.join(map(str, case.shape))}", tuple(keys.values()), run)

    def _checked_time(
        self, names: tuple[str, ...], prepare: Callable[[], dict[str, Contender]], work: Work, dtype: str
    ) -> Iterator[Measured]:
        """`measure`, or one and the same failure for all if a call takes too long or there is no reference."""
        least = self.roofline().seconds(*work, dtype)
        why = None
        if least > LONGEST_CALL:
            why = f"not run: a call takes {least:.0f} s or more, over {LONGEST_CALL:.0f} s"
        else:
            torch.compiler.reset()
            try:
                contenders = prepare()
            except Exception as error:
                why = f"no reference: {failure(error)}"
        if why is not None:
            yield from (Measured(name, {"failure": why}, []) for name in names)
            return
        yield from measure(contenders, self.device, self.budget)

    def _model_row(self, section: str, cell: Cell, key: str, name: str, figures: dict[str, Any]) -> dict[str, Any]:
        row = {"key": key, "section": section, "contender": name, **dataclasses.asdict(cell), "quick": self.quick}
        row |= self._with_rates(figures, work_of(cell), cell.dtype)
        return row | ({} if row["failure"] else {"images_per_s": 1e3 * cell.batch / row["p50_ms"]})

    def _with_rates(self, figures: dict[str, Any], work: Work, dtype: str) -> dict[str, Any]:
        return figures | ({} if figures["failure"] else rates(figures["p50_ms"] / 1e3, work, self.roofline(), dtype))


def work_of(cell: Cell) -> Work:
    """Work of a cell, all bytes in its dtype: parameters in training are float32, but most bytes are activations."""
    return model_work(cell.config, cell.batch, cell.side, DTYPES[cell.dtype].itemsize, cell.mode == "training")


def _key(section: str, cell: Cell) -> str:
    depths = "" if cell.depths is None else "-" + "-".join(map(str, cell.depths))
    return f"{section}/{cell.variant}{depths}/{cell.batch}x{cell.side}/{cell.dtype}/{cell.mode}"
