"""``pytest bench/ --benchmark-only``: options, and how our measurements get into pytest-benchmark's tables.

pytest-benchmark reads a clock. The clock here advances only by the times that `convnext_fast.measuring` measures: with
CUDA events on a GPU, with the wall clock on a CPU, where contenders for the same work are timed alternately.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import environment
from bench.timing import Contender, Measured, measure, rates
from bench.variants import is_ours
from bench.work import Work

BUDGET = {True: 3.0, False: 0.7}
"""Seconds of sampling for each contender, with ``--full`` and without."""
_now = 0.0


def measured_time() -> float:
    """The clock: seconds measured so far."""
    return _now


def _let_pass(times: list[float]) -> None:
    global _now
    _now += times.pop(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option ``--full``."""
    parser.addoption("--full", action="store_true", help="benchmarks: every size and contender (default: quick ones)")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The device of the run, and what the run leaves out."""
    device = default_device()
    facts = ", ".join(f"{name} {value}" for name, value in environment.facts(device).items())
    if config.getoption("--full"):
        return [f"benchmarks: {facts}"]
    return [f"benchmarks: {facts}", "benchmarks: quick sizes; more sizes, and torch.compile of each, with --full"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make every benchmark use our clock."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=measured_time))


def default_device() -> torch.device:
    """CUDA if available, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device to measure."""
    return default_device()


@pytest.fixture(scope="session")
def roofline(device: torch.device) -> environment.Roofline:
    """The device's rates, from its data sheet or measured."""
    dtypes = ("float32",) if device.type == "cpu" else ("float32", "bfloat16", "float16")
    return environment.roofline(device, environment.measured_rates(device, dtypes))


@pytest.fixture(scope="session")
def _measured() -> dict[str, dict[str, Measured]]:
    """Results by work and contender: all contenders are measured when the first is requested."""
    return {}


@pytest.fixture
def record(
    benchmark: Any,
    device: torch.device,
    roofline: environment.Roofline,
    _measured: dict[str, dict[str, Measured]],
    request: pytest.FixtureRequest,
) -> Callable[[str, str, dict[str, Any], Callable[[], dict[str, Contender]], Work], None]:
    """``record(work_name, contender, row, prepare, work)`` fills the benchmark, or skips or fails with the reason."""

    def record(
        key: str, name: str, row: dict[str, Any], prepare: Callable[[], dict[str, Contender]], work: Work
    ) -> None:
        if key not in _measured:
            torch.compiler.reset()
            found = measure(prepare(), device, BUDGET[request.config.getoption("--full")])
            _measured[key] = {each.name: each for each in found}
        _, figures, times = _measured[key][name]
        reason = figures["failure"]
        if reason and (is_ours(name) or reason.startswith("WrongResult")):
            pytest.fail(f"{key}, {name}: {reason}", pytrace=False)
        if reason:
            pytest.skip(f"{key}, {name}: {reason}")
        benchmark.group = key
        speed = rates(figures["p50_ms"] / 1e3, work, roofline, row["dtype"])
        benchmark.extra_info.update(environment.facts(device) | row | {"contender": name} | figures | speed)
        benchmark.pedantic(_let_pass, args=(list(times),), rounds=len(times), iterations=1)

    return record
