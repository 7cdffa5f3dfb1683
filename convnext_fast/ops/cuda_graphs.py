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
"""The most kinds of inputs that a run remembers; the least recently used one goes."""
_CALLS_BEFORE = 2
"""A graph costs some calls' time and keeps memory, which an input that never comes back is not worth."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    x: Tensor
    outputs: tuple[Tensor, ...]


class Graphs:
    """Stands for `backends.gpu.steps` of one run, and replays its graphs where it can.

    The graphs share their memory, so calls from several threads and streams run one after another. The outputs of a
    call are tensors of its own. No graph is captured or replayed inside another capture, or while launch hooks listen.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: tuple | None = None  # the plan, and where its live weights are
        self._kinds: OrderedDict[tuple, int | _Captured] = OrderedDict()  # a number counts calls

    def __call__(self, x: Tensor, plan: tuple, ends: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """As `backends.gpu.steps`; the same ``plan``, by identity, as long as no folded weight changed."""
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
            self._done.synchronize()  # no graph goes, and none of its weights, while it runs
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
            for _ in range(2):  # compiles, tunes and records what differs for this memory, outside of the capture
                steps(given, plan, ends, dtype)
        # Other threads may go on allocating.
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
