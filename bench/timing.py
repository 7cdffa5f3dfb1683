"""Check contenders for the same work, then time them.

A contender that fails, or whose result is wrong, gets a row that says so and no time.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.environment import Roofline
from bench.work import Work
from convnext_fast.measuring import Call, peak_bytes, relative_error, saved_bytes, seconds

# Least seconds of a sample: if a call is shorter, several in a row are one sample.
LEAST_SAMPLE = {"cpu": 2e-3, "cuda": 5e-3}
LEAST_ROUNDS, MOST_ROUNDS, MOST_REPEATS = 5, 50, 200
LEAST_BOUNDS = {"float32": 1e-5, "float64": 1e-10}
"""Relative errors that every contender may have."""


@dataclasses.dataclass
class Job:
    """A prepared contender.

    Attributes:
        ready: does what is not timed, and returns the call to time.
        results: outputs and gradients of one run, in the order of the reference's.
        owned: parameters and inputs, which are not counted as saved for the backward pass.
        trains: whether autograd saves anything.
        most_repeats: calls that may be prepared at a time.
    """

    ready: Callable[[], Call]
    results: Callable[[], list[Tensor]]
    owned: Sequence[Tensor] = ()
    trains: bool = False
    most_repeats: int = MOST_REPEATS

    def run(self) -> Any:
        """Prepare a call and make it."""
        return self.ready()()


@dataclasses.dataclass(frozen=True)
class Reference:
    """Results in float64, and how far a contender may be from them.

    Attributes:
        expected: outputs, and gradients.
        bounds: largest allowed relative error of each: twice eager's in the same dtype, which is taken as no less than
            the median of eager's errors, and at least ``LEAST_BOUNDS``.
    """

    expected: list[Tensor]
    bounds: list[float]

    @classmethod
    def of(cls, expected: list[Tensor], eager: list[Tensor], dtype: str) -> Reference:
        """A reference whose bounds follow from the errors of eager's results.

        Raises:
            ValueError: eager's results are not finite, so that nothing can be compared with them.
        """
        errors = [relative_error(a, b) for a, b in zip(eager, expected, strict=True)]
        if not math.isfinite(sum(errors)):
            raise ValueError(f"eager's own results in {dtype} are not finite")
        least = max(LEAST_BOUNDS.get(dtype, 0.0) / 2, statistics.median(errors))
        return cls(expected, [2 * max(error, least) for error in errors])

    def worst(self, results: Sequence[Tensor]) -> tuple[float, float]:
        """Relative error and bound of the result that is nearest to its bound, or furthest over it."""
        errors = [relative_error(a, b) for a, b in zip(results, self.expected, strict=True)]
        return max(zip(errors, self.bounds, strict=True), key=lambda pair: pair[0] / pair[1] if pair[1] else pair[0])


class WrongResult(Exception):
    """A contender's result differs from the reference."""


def check(job: Job, reference: Reference) -> tuple[float, float]:
    """The worst error of a job against float64, and its bound.

    Raises:
        WrongResult: it is over the bound.
    """
    error, bound = reference.worst(job.results())
    if not error <= bound:
        raise WrongResult(f"relative error {error:.1e} against float64 is over the bound {bound:.1e}")
    return error, bound


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, milliseconds."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else [samples[0]] * 9
    return {"p20_ms": 1e3 * cuts[1], "p50_ms": 1e3 * cuts[4], "p80_ms": 1e3 * cuts[7], "rounds": len(samples)}


def rates(median: float, work: Work, roofline: Roofline, dtype: str) -> dict[str, Any]:
    """GB/s and TFLOP/s of ``work`` done in ``median`` seconds, and the roofline's share of that time."""
    return {
        "gbs": work.bytes / median / 1e9,
        "tflops": work.flops / median / 1e12,
        "of_roofline": roofline.seconds(*work, dtype) / median,
        "roofline": roofline.source,
    }


def failure(error: BaseException) -> str:
    """What a row says about an error: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def samples(jobs: Sequence[Job], device: torch.device, budget: float) -> list[list[float]]:
    """Seconds per call of each job. Jobs are sampled in turn, for about ``budget`` seconds each and at least 5 rounds.

    Each turn begins with a call that is not timed, so that no job pays for the caches and the heap that another left:
    a sample is the time of a call in a program that makes one after the other.
    """
    repeats, costs = [], []
    for job in jobs:
        once = seconds([job.ready()], device)
        least = LEAST_SAMPLE.get(device.type, LEAST_SAMPLE["cuda"])
        repeats.append(max(1, min(job.most_repeats, round(least / max(once, 1e-9)))))
        costs.append(once * (1 + repeats[-1]))
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget * len(jobs) / sum(costs))))
    taken: list[list[float]] = [[] for _ in jobs]
    for _ in range(rounds):
        for job, count, times in zip(jobs, repeats, taken, strict=True):
            seconds([job.ready()], device)
            times.append(seconds([job.ready() for _ in range(count)], device))
    return taken


def cpu_peak_bytes(call: Call) -> int:
    """`measuring.peak_bytes` on a CPU, with PyTorch's profiler: it sees tensors, not what other libraries allocate."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise reports its start and end on stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def memory(job: Job, device: torch.device) -> dict[str, float | None]:
    """Peak MiB of a call, and MiB saved for the backward pass; None where these are unknown."""
    found: dict[str, float | None] = {"peak_mib": None, "saved_mib": None}
    for tensor in job.owned:
        tensor.grad = None  # gradients of the previous call do not belong to this one
    try:
        peak = cpu_peak_bytes(job.run) if device.type == "cpu" else peak_bytes(job.run, device)
        found["peak_mib"] = peak / 2**20 or None  # zero bytes: the contender does not use PyTorch's allocator
        found["saved_mib"] = saved_bytes(job.run, job.owned) / 2**20 if job.trains else 0.0
    except RuntimeError:
        pass
    return found


class Contender(NamedTuple):
    """A function that makes a job, and the reference for its results."""

    build: Callable[[], Job]
    reference: Reference


class Measured(NamedTuple):
    """A contender's figures for a row, among them "failure", and its samples in seconds a call (none if it failed)."""

    name: str
    figures: dict[str, Any]
    times: list[float]


def measure(contenders: dict[str, Contender], device: torch.device, budget: float) -> Iterator[Measured]:
    """Check and time each contender for about ``budget`` seconds.

    On a CPU all run alternately, so that noise affects all alike; elsewhere each has the device's memory to itself.
    """
    if device.type == "cpu":
        yield from _measure(contenders, device, budget)
        return
    for name, contender in contenders.items():
        yield from _measure({name: contender}, device, budget)
        torch.compiler.reset()  # also frees the CUDA graphs that a compiled model keeps
        gc.collect()
        getattr(torch, device.type).empty_cache()


def _measure(contenders: dict[str, Contender], device: torch.device, budget: float) -> list[Measured]:
    jobs: dict[str, Job] = {}
    found: dict[str, dict[str, Any]] = {}
    taken: dict[str, list[float]] = {}
    for name, (build, reference) in contenders.items():
        begun = time.perf_counter()
        try:
            job = build()
            error, bound = check(job, reference)
        except Exception as problem:
            found[name] = {"failure": failure(problem)}
            continue
        first = time.perf_counter() - begun
        found[name] = {"failure": None, "error": error, "error_bound": bound, "first_call_s": first}
        jobs[name] = job
    try:
        taken = dict(zip(jobs, samples(list(jobs.values()), device, budget), strict=True)) if jobs else {}
        for name, times in taken.items():
            found[name] |= quantiles(times) | memory(jobs[name], device)
    except Exception as problem:
        found |= {name: {"failure": failure(problem)} for name in jobs}
        taken = {}
    return [Measured(name, figures, taken.get(name, [])) for name, figures in found.items()]
