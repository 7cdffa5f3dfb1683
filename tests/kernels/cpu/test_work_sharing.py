"""How the CPU kernels share work: threads seldom wait for each other, and get about equal shares."""

import collections
import ctypes
import itertools

import pytest
import torch
from test_llvm import frozen_weights
from test_llvm_grn_mlp import draw
from test_llvm_grn_mlp import ours as v2_step
from test_llvm_mlp import ours as step
from test_llvm_mlp import parameters

from convnext_fast.backends.cpu import llvm, llvm_grn

launching = pytest.importorskip("convnext_fast.kernels.cpu.launching", reason="needs llvmlite")
from convnext_fast.kernels.cpu import work_sharing  # noqa: E402
from convnext_fast.kernels.cpu.machine import AVX2, AVX512  # noqa: E402

pytestmark = pytest.mark.skipif(not launching.has(AVX2), reason="these kernels need x86, Linux and AVX2")


@pytest.fixture
def waits(monkeypatch):
    """Counts, by thread, how often each waits for all others."""
    real, counted = launching._threads(), collections.Counter()

    @ctypes.CFUNCTYPE(None)
    def barrier():
        counted[real.omp_get_thread_num()] += 1
        real.GOMP_barrier()

    class Counting:
        GOMP_barrier = barrier

        def __getattr__(self, name):
            return getattr(real, name)

    monkeypatch.setattr(launching, "_threads", Counting)
    monkeypatch.setattr(llvm, "_launch", llvm._launch.__wrapped__)
    launching._kernel.cache_clear()
    yield counted
    launching._kernel.cache_clear()  # the next test's kernels call libgomp again


@pytest.mark.parametrize("rows", [49, 98, 196, 784])
@pytest.mark.parametrize("team", [2, 3, 4])
def test_training_waits_only_where_samples_are_summed(rows, team, threads, waits):
    """A thread loses a time slice if it waits for one that another process keeps from running."""
    threads(team)
    step(AVX2, *torch.randn(3, rows, 32), *parameters(32, 128), torch.rand(rows, 1), False)
    assert not waits
    v2_step(AVX2, *draw(1, rows, 32, 128), False)
    assert waits == dict.fromkeys(range(team), 4)  # between the passes, forward and backward


@pytest.mark.parametrize(("kind", "expected"), [(llvm.CompiledBlock, 0), (llvm_grn.CompiledV2Block, 2)])
def test_frozen_blocks_wait_only_where_samples_are_summed(kind, expected, threads, waits):
    threads(2)
    v2 = kind is llvm_grn.CompiledV2Block
    weights = frozen_weights(32, 128, 7)
    kind(weights._replace(grn_weight=torch.randn(128)) if v2 else weights, AVX2)(torch.randn(1, 14, 14, 32), 1e-6)
    assert waits == (dict.fromkeys(range(2), expected) if expected else {})


@pytest.mark.parametrize("machine", [AVX2, AVX512])
@pytest.mark.parametrize("weight", [4 * 96**2, 4 * 768**2])
@pytest.mark.parametrize("rows", [49, 98, 196, 392, 784, 1568, 3136])
def test_rows_are_shared_evenly(machine, weight, rows):
    for team in (2, 4):
        given = work_sharing.numbers_of_rows(machine, 1, rows, weight, 1e-6, team)
        assert not given["split_columns"]
        ends = [min(rows, given["pieces"] * thread // team * given["unit"]) for thread in range(team + 1)]
        most = max(end - start for start, end in itertools.pairwise(ends))
        assert most <= rows / team * 1.2
