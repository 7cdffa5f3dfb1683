"""The kernels for x86 CPUs of frozen ConvNeXt V2 blocks."""

import gc
import math
import weakref

import pytest
import torch
from drawn import drawn
from frozen_support import frozen_v2_weights
from hypothesis import strategies as st
from support import draws_for, randomise, relative_error

from convnext_fast import ConvNext, ConvNextV2Config
from convnext_fast.backends.cpu import packed_weights, response_norm

launching = pytest.importorskip("convnext_fast.kernels.cpu.launching", reason="needs llvmlite")
from convnext_fast.kernels.cpu.machine import AVX2  # noqa: E402
from test_llvm import MACHINES, check, run_block, sizes  # noqa: E402

from convnext_fast.backends.cpu.llvm_grn import CompiledV2Block  # noqa: E402

pytestmark = pytest.mark.skipif(not launching.has(AVX2), reason="these kernels need x86, Linux and AVX2")


@pytest.mark.parametrize("machine", MACHINES)
@drawn(
    st.tuples(st.integers(1, 3), sizes, sizes),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([3, 5, 7]),
    st.integers(1, 4),
    few=4,
    many=12,
)
def test_block(machine, image, channels, ratio, side, team_size):
    channels *= machine.lanes
    found = []
    for _ in draws_for(math.prod(image) * channels):
        weights, x = frozen_v2_weights(channels, ratio * channels, side), torch.randn(*image, channels)
        found.append(run_block(CompiledV2Block, weights, machine, x, team_size))
    check(*found)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("image", [(3, 14, 14), (4, 7, 7), (2, 3, 100)])
def test_equal_bits_for_every_number_of_threads_and_batch(machine, image, threads, monkeypatch):
    block = CompiledV2Block(frozen_v2_weights(96, 192, 7), machine)
    x = torch.randn(*image, 96)
    threads(1)
    expected = block(x, 1e-6)
    for count in (1, 2, 3, 16):
        threads(count)
        assert torch.equal(block(x, 1e-6), expected)
        assert torch.equal(torch.cat([block(one, 1e-6) for one in x.split(1)]), expected)
    monkeypatch.setattr(response_norm, "_CACHE_BYTES", 1)  # each sample in a block of its own
    assert torch.equal(block(x, 1e-6), expected)


def test_a_block_is_prepared_once_and_freed_with_its_weights():
    weights = frozen_v2_weights(32, 64, 7)
    block = packed_weights.prepared_block(weights, "gelu")
    assert isinstance(block, CompiledV2Block)
    assert packed_weights.prepared_block(weights, "gelu") is block
    other = weights._replace(grn_weight=weights.grn_weight.clone())
    assert packed_weights.prepared_block(other, "gelu") is not block
    assert packed_weights.prepared_block(weights, "relu") is None
    freed = weakref.ref(weights.w1)
    del block, other, weights
    gc.collect()
    assert freed() is None


def test_frozen_models_run_them(monkeypatch):
    config = ConvNextV2Config(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, num_labels=3)
    model = randomise(ConvNext(config)).eval()
    x, calls = torch.randn(2, 3, 32, 40), []
    with torch.no_grad():
        model.fused = False
        expected = model(x)
        model.fused = True
        plain = CompiledV2Block.launch
        monkeypatch.setattr(CompiledV2Block, "launch", lambda *given: calls.append(1) or plain(*given))
        assert model.backend_for(x) == "aten"
        assert relative_error(model.freeze()(x), expected) <= 1e-5
        assert model.backend_for(x) == "cpu"
        assert len(calls) == 3
