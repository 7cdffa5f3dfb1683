"""A run of frozen steps as CUDA graphs: one for each kind of input, captured once and replayed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..kernels.launching import current
from ..kernels.weights import ConvNorm

MOST = 8
"""The most kinds of inputs that a run remembers; the least recently used one is dropped."""
_CALLS_BEFORE = 2
"""Calls without a graph. A capture takes as long as several calls and keeps memory: too much for a rare input."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    x: Tensor
    outputs: tuple[Tensor, ...]


class Graphs:
    """Replaces `backends.gpu.steps` for one run, and replays graphs where possible.

    The graphs share their memory, so calls from several threads and streams run one after another. Each call returns
    new tensors. No graph is captured or replayed inside another capture, or while launch hooks observe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: tuple | None = None  # the plan, and the addresses of its live weights
        self._kinds: OrderedDict[tuple, int | _Captured] = OrderedDict()  # an int counts calls

    def __call__(self, x: Tensor, plan: tuple, ends: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """As `backends.gpu.steps`; ``plan`` has to be the same object as long as no folded weight changes."""
        triton = choose.module("triton")
        if not x.is_cuda or triton.is_observed():
            return triton.steps(x, plan, ends, dtype)
        with self._lock, current(x):
            if torch.cuda.is_current_stream_capturing():
                return triton.steps(x, plan, ends, dtype)
            live = [w for w in plan[0][0] if w is not None] if isinstance(plan[0][0], ConvNorm) else []
            self._drop_stale(plan, [w.data_ptr() for w in live])
            kind = triton.description((x, *live)), ends
            known = self._kinds.pop(kind, 0)
            if known == _CALLS_BEFORE:
                known = self._capture(x, plan, ends, dtype)
            self._kinds[kind] = known + 1 if isinstance(known, int) else known
            if len(self._kinds) > MOST:
                self._done.synchronize()
                self._kinds.popitem(last=False)
            return triton.steps(x, plan, ends, dtype) if isinstance(known, int) else self._replay(known, x)

    def _drop_stale(self, plan: tuple, addresses: list[int]) -> None:
        if self._seen is not None:
            if plan is self._seen[0] and addresses == self._seen[1]:
                return
            self._done.synchronize()  # no graph or weight is freed while a graph runs
        self._kinds.clear()
        self._seen = plan, addresses
        self._pool, self._done = torch.cuda.graph_pool_handle(), torch.cuda.Event()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, x: Tensor, plan: tuple, ends: tuple[int, ...], dtype: torch.dtype) -> _Captured:
        steps = choose.module("triton").steps
        given, graph, stream = torch.empty_like(x), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self._done.wait(stream)
        with torch.cuda.stream(stream):
            given.copy_(x)
            for _ in range(2):  # compiles, tunes and records for this memory before the capture
                steps(given, plan, ends, dtype)
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            outputs = steps(given, plan, ends, dtype)
        return _Captured(graph, given, outputs)

    def _replay(self, captured: _Captured, x: Tensor) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream()
        self._done.wait(stream)
        captured.x.copy_(x)
        captured.graph.replay()
        outputs = tuple([y.clone() for y in captured.outputs])
        self._done.record(stream)
        return outputs
