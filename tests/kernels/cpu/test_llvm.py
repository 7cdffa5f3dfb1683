"""The kernels for x86 CPUs: values at all shapes, equal bits however threads share the work, memory, lifetimes."""

import functools
import gc
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from convnext_fast.kernels.weights import ConvNorm, FrozenBlock, FrozenDownsample
from drawn import drawn
from fresh import python
from frozen_support import frozen_weights, plain_block
from hypothesis import given, settings
from hypothesis import strategies as st
from support import draws_for, no_worse_together, randomise, relative_error

from convnext_fast import ConvNext, ConvNextConfig, ops
from convnext_fast.backends import reference
from convnext_fast.backends.cpu import llvm, packed_weights
from convnext_fast.backends.cpu import ops as cpu

launching = pytest.importorskip("convnext_fast.kernels.cpu.launching", reason="needs llvmlite")
from convnext_fast.kernels.cpu import work_sharing  # noqa: E402
from convnext_fast.kernels.cpu.machine import AVX2, AVX512  # noqa: E402

MACHINES = [
    pytest.param(machine, id=name, marks=pytest.mark.skipif(not launching.has(machine), reason=f"no {name} here"))
    for name, machine in (("AVX2", AVX2), ("AVX512", AVX512))
]
pytestmark = pytest.mark.skipif(not launching.has(AVX2), reason="these kernels need x86, Linux and AVX2")

sizes = st.one_of(st.integers(1, 16), st.sampled_from([28, 57, 65, 130]))


def check(*draws):
    """Check each draw: (ours, float64's, eager's)."""
    assert all(got.is_contiguous() for got, _, _ in draws)
    assert no_worse_together(draws)


def patches(image, patch):
    """The number of patches in (images, height, width)."""
    return image[0] * (image[1] // patch[0]) * (image[2] // patch[1])


def run_block(compiled, weights, machine, x, team_size):
    """(ours, float64's, eager's) of a block, ours with ``team_size`` threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(team_size)
        got = compiled(weights, machine)(x, 1e-6)
    finally:
        torch.set_num_threads(before)
    return got, plain_block(x.double(), weights, "gelu"), plain_block(x, weights, "gelu")


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
        weights, x = frozen_weights(channels, ratio * channels, side), torch.randn(*image, channels)
        found.append(run_block(llvm.CompiledBlock, weights, machine, x, team_size))
    check(*found)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("side", "channels"), [(56, 96), (28, 192), (14, 384), (7, 768)])
def test_blocks_of_real_models(machine, side, channels):
    """Products of real depth, against eager's own error; and a mean far from zero."""
    weights = frozen_weights(channels, 4 * channels, 7)
    weights = weights._replace(dwconv_bias=weights.dwconv_bias + 5)
    x = torch.randn(1, side, side, channels)
    check(run_block(llvm.CompiledBlock, weights, machine, x, torch.get_num_threads()))


@pytest.mark.parametrize("machine", MACHINES)
def test_no_bias_of_the_convolution(machine):
    weights = frozen_weights(32, 64, 7)._replace(dwconv_bias=None)
    check(run_block(llvm.CompiledBlock, weights, machine, torch.randn(2, 9, 9, 32), torch.get_num_threads()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_default_dtype_and_vectors_of_another_dtype(dtype):
    """Kernels read float32 with any default dtype of PyTorch and any dtype and strides of the biases."""
    weights = frozen_weights(32, 64, 7)

    def strided(vector):
        return torch.stack((vector, vector), -1).double()[..., 0]

    biases = {name: strided(getattr(weights, name)) for name in ("dwconv_bias", "b1", "b2")}
    frozen = FrozenDownsample(torch.randn(48, 32, 2, 2), torch.randn(48))
    stem = torch.randn(32, 3, 4, 4), *torch.randn(3, 32)
    x, image = torch.randn(2, 9, 11, 32), torch.randn(1, 3, 17, 18)
    expected = (
        llvm.CompiledBlock(weights, AVX2)(x, 1e-6),
        packed_weights.prepared_downsample(*frozen)(x, 1e-6),
        llvm.prepare_stem(*stem)(image, 1e-6),
    )
    torch.set_default_dtype(dtype)
    try:
        got = (
            llvm.CompiledBlock(weights._replace(**biases), AVX2)(x, 1e-6),
            packed_weights.prepared_downsample(frozen.weight, strided(frozen.bias))(x, 1e-6),
            llvm.prepare_stem(stem[0], *map(strided, stem[1:]))(image, 1e-6),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("image", [(3, 14, 14), (4, 7, 7), (2, 3, 100), (5, 9, 9)])
def test_equal_bits_for_every_number_of_threads_and_batch(machine, image, threads):
    """Also whether threads share rows or columns."""
    block = llvm.CompiledBlock(frozen_weights(96, 192, 7), machine)
    x = torch.randn(*image, 96)
    threads(1)
    expected = block(x, 1e-6)
    splits = set()
    for count in (1, 2, 3, 4, 16):
        threads(count)
        splits.add(work_sharing.numbers(image[0], image[1:], image[1:], 1e-6, count)["split_columns"])
        assert torch.equal(block(x, 1e-6), expected)
        assert torch.equal(torch.cat([block(one, 1e-6) for one in x.split(1)]), expected)
    assert splits == {0, 1}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_pixel_propagates_only_to_its_neighbourhood(machine, bad):
    x = torch.randn(1, 12, 30, 32)
    x[0, 4, 15, 3] = bad
    finite = llvm.CompiledBlock(frozen_weights(32, 64, 7), machine)(x, 1e-6).isfinite().all(-1)[0]
    footprint = torch.zeros(12, 30, dtype=torch.bool)
    footprint[1:8, 12:19] = True
    assert torch.equal(~finite, footprint)


@given(st.tuples(st.integers(1, 3), sizes, sizes), st.sampled_from([8, 16, 24, 96]), st.sampled_from([3, 5, 7]))
@settings(max_examples=25, deadline=None)
def test_convolution_and_its_gradients(image, channels, side):
    def results():
        """(ours, float64's, eager's) of the output and of each gradient."""
        x, du = torch.randn(2, *image, channels)
        weight, bias = torch.randn(channels, 1, side, side) / side, torch.randn(channels)

        def plain(dtype):
            leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
            u = F.conv2d(leaves[0].permute(0, 3, 1, 2), *leaves[1:], padding=side // 2, groups=channels)
            u = u.permute(0, 2, 3, 1)
            return [u, *torch.autograd.grad(u, leaves[:2], du.to(dtype))]

        ours = llvm.dwconv(x, weight, bias), llvm.dwconv(du, weight.flip(2, 3), None)
        return zip(
            (*ours, llvm.dwconv_weight_grad(x, du, side)), plain(torch.float64), plain(torch.float32), strict=True
        )

    smallest = channels * min(math.prod(image), side * side)
    assert all(map(no_worse_together, zip(*(results() for _ in draws_for(smallest)), strict=True)))


def test_a_weight_gradient_of_equal_bits_for_every_number_of_threads(threads):
    x, du = torch.randn(2, 2, 9, 20, 24)
    threads(1)
    expected = llvm.dwconv_weight_grad(x, du, 7)
    for count in (2, 3, 16):
        threads(count)
        assert torch.equal(llvm.dwconv_weight_grad(x, du, 7), expected)


@given(
    st.tuples(st.integers(1, 3), st.integers(2, 30), st.integers(2, 30)),
    st.sampled_from([8, 16, 24, 48, 96]),
    st.sampled_from([8, 32, 40, 96]),
    st.sampled_from([(2, 2), (1, 2), (2, 1)]),
)
@settings(max_examples=12, deadline=None)
def test_downsampling(image, channels, out_channels, patch):
    def results():
        x = torch.randn(*image, channels) * 3 + 1
        weight = torch.randn(out_channels, channels, *patch) / channels**0.5
        frozen = FrozenDownsample(weight.contiguous(memory_format=torch.channels_last), torch.randn(out_channels))

        def plain(dtype):
            n = F.layer_norm(x.to(dtype), [channels], eps=1e-6).permute(0, 3, 1, 2)
            return F.conv2d(n, *(t.to(dtype) for t in frozen), stride=patch).permute(0, 2, 3, 1)

        return packed_weights.prepared_downsample(*frozen)(x, 1e-6), plain(torch.float64), plain(torch.float32)

    check(*(results() for _ in draws_for(patches(image, patch) * out_channels)))


@given(
    st.tuples(st.integers(1, 2), st.integers(4, 70), st.integers(4, 70)),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([8, 48, 96]),
    st.sampled_from([(4, 4), (2, 4), (4, 1)]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_stem(image, channels, out_channels, patch, bias, channels_last):
    def results():
        x = torch.randn(image[0], channels, *image[1:])
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        parameters = [
            torch.randn(out_channels, channels, *patch) / 4,
            torch.randn(out_channels) if bias else None,
            torch.randn(out_channels),
            torch.randn(out_channels),
        ]

        def plain(dtype):
            weight, bias, ln_weight, ln_bias = (None if t is None else t.to(dtype) for t in parameters)
            u = F.conv2d(x.to(dtype), weight, bias, stride=patch).permute(0, 2, 3, 1)
            return F.layer_norm(u, [out_channels], ln_weight, ln_bias, 1e-6)

        return llvm.prepare_stem(*parameters)(x.contiguous(), 1e-6), plain(torch.float64), plain(torch.float32)

    check(*(results() for _ in draws_for(patches(image, patch) * out_channels)))


def test_unsupported_shapes():
    for channels, hidden, act in ((12, 48, "gelu"), (16, 20, "gelu"), (16, 64, "silu")):
        assert packed_weights.prepared_block(frozen_weights(channels, hidden, 3), act) is None
    assert packed_weights.prepared_downsample(torch.randn(16, 12, 2, 2), torch.randn(16)) is None
    odd = torch.randn(16, 3, 3, 3), None, torch.randn(16), torch.randn(16)
    assert llvm.prepare_stem(*odd) is None
    out = cpu.patchify_stem_fwd(torch.randn(1, 3, 9, 9), ConvNorm(*odd), 1e-6, torch.float32, torch.float32)
    assert out.shape == (1, 3, 3, 16)


def test_a_block_is_prepared_once_and_freed_with_its_weights():
    x, weights = torch.randn(1, 4, 4, 16), frozen_weights(16, 32, 3)

    def prepared_for(*weights, act="gelu"):
        weights = FrozenBlock(*weights)
        block = packed_weights.prepared_block(weights, act)
        assert relative_error(block(x, 1e-6), plain_block(x.double(), weights, act)) < 1e-5
        return block

    first = prepared_for(*weights)
    assert isinstance(first, llvm.CompiledBlock)
    assert prepared_for(*weights) is first
    *head, b1, w2, b2, _ = weights
    for other in ((*head, b1, w2 + 1, b2), (*head, b1 - 1, w2, b2), (*head, b1, w2, b2 + 1)):
        assert prepared_for(*other) is not first
    assert prepared_for(weights[0] + 1, *weights[1:]) is not first
    assert prepared_for(weights[0], None, *weights[2:]) is not first
    assert packed_weights.prepared_block(weights, "relu") is None
    gone, key = weakref.ref(prepared_for(*weights)), id(weights.w1)
    del first, weights, head, b1, w2, b2, other
    gc.collect()
    assert gone() is None
    assert key not in packed_weights._KEPT


def test_a_downsampling_layer_is_prepared_once_and_freed_with_its_weights():
    weight, bias = torch.randn(16, 8, 2, 2), torch.randn(16)
    first = packed_weights.prepared_downsample(weight, bias)
    assert packed_weights.prepared_downsample(weight, bias) is first
    second = packed_weights.prepared_downsample(weight, bias + 1)
    x, plain = torch.randn(1, 4, 4, 8), []
    for dtype in (torch.float64, torch.float32):
        n = F.layer_norm(x.to(dtype), [8], eps=1e-6).permute(0, 3, 1, 2)
        plain.append(F.conv2d(n, weight.to(dtype), (bias + 1).to(dtype), stride=2).permute(0, 2, 3, 1))
    check((second(x, 1e-6), *plain))
    gone, key = weakref.ref(second), id(weight)
    del first, second, weight
    gc.collect()
    assert gone() is None
    assert key not in packed_weights._KEPT


@pytest.mark.parametrize("machine", MACHINES)
def test_gelu_and_its_derivative(machine, monkeypatch):
    """Numbers of every size: as close to float64 as PyTorch's, with NaN and infinity where the functions have them."""
    monkeypatch.setattr(llvm, "machine_for", lambda *_: machine)
    scale = torch.logspace(-38, 3, 2000)
    x = torch.cat([torch.linspace(-20, 20, 40001), scale, -scale, torch.tensor([0.0, float("nan"), float("inf")])])
    x = F.pad(x, (0, -len(x) % 16))
    slope, again = torch.ones_like(x), torch.empty_like(x)
    value = llvm.gelu(x)
    llvm.gelu_bwd_(slope, x, again)
    assert torch.equal(again, value) or torch.equal(again.nan_to_num(), value.nan_to_num())
    in_place, dh = x.clone(), torch.randn_like(x)
    expected = dh * slope
    llvm.gelu_bwd_(dh, in_place, in_place)
    assert torch.equal(in_place.nan_to_num(), value.nan_to_num())
    assert torch.equal(dh.nan_to_num(), expected.nan_to_num())

    wide = x.double().requires_grad_()
    expected = F.gelu(wide)
    (expected_slope,) = torch.autograd.grad(expected.nan_to_num().sum(), wide)
    leaf = x.clone().requires_grad_()
    eager = F.gelu(leaf)
    (eager_slope,) = torch.autograd.grad(eager.nan_to_num().sum(), leaf)
    finite = x.isfinite()
    assert torch.equal(value[~finite].isnan(), expected[~finite].isnan())
    assert torch.equal(slope.isnan(), x.isnan())
    assert value[x == float("inf")] == float("inf")
    for ours, exact, eagers in ((value, expected, eager), (slope, expected_slope, eager_slope)):
        errors = [(t.double() - exact)[finite].abs().max() for t in (ours, eagers)]
        assert errors[0] <= 2 * errors[1]
    near = (x.abs() < 1) & (x.abs() > 1e-30)
    assert ((value.double() - expected) / expected)[near].abs().max() < 1e-6


def test_memory_outside_the_tensors_is_not_touched():
    """Reading or writing a byte before or after the tensors ends the process."""
    script = Path(__file__).with_name("guarded_memory.py")
    support = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=support)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == len(done.stdout.splitlines()) >= 9


@pytest.mark.parametrize("without", ["llvmlite", "a new llvmlite", "CONVNEXT_FAST_BACKEND"])
def test_models_run_without_the_kernels(without):
    code = (
        "import sys, torch\n"
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name != 'llvmlite': return real(name)\n"
        f"    if {without!r} == 'llvmlite': raise metadata.PackageNotFoundError(name)\n"
        f"    return '0.45.1' if {without!r} == 'a new llvmlite' else real(name)\n"
        "metadata.version = version\n"
        "from convnext_fast import ConvNext, ConvNextConfig\n"
        "model = ConvNext(ConvNextConfig(num_stages=1, hidden_sizes=[16], depths=[1])).eval()\n"
        "model.freeze()\n"
        "with torch.inference_mode(): print(tuple(model(torch.randn(1, 3, 32, 32)).shape), 'llvmlite' in sys.modules)"
    )
    done = python(code, CONVNEXT_FAST_BACKEND="aten" if without.isupper() else "auto")
    assert done.stdout.strip() == "(1, 2) False", done.stdout + done.stderr


def test_whole_model():
    config = ConvNextConfig(num_stages=2, hidden_sizes=[16, 40], depths=[2, 1])
    model = randomise(ConvNext(config)).eval()
    x = torch.randn(2, 3, 70, 66)
    with torch.inference_mode():
        expected = model.double()(x.double())
        model.float().fused = False
        eager = model(x)
        model.fused = True
        model.freeze()
        check((model(x), expected, eager))


def test_no_unit_is_narrower_than_a_group():
    for width in (*range(1, 5000), 16384, 65537):
        cut = work_sharing.numbers(1, (1, width), (1, width), 1e-6, 2)
        last = width - (cut["pieces"] - 1) * cut["unit"]
        assert cut["unit"] <= 64
        assert min(width, work_sharing.GROUP) <= last <= cut["unit"]


def test_tensors_with_the_negative_bit():
    weights, x = frozen_weights(16, 32, 3), torch.randn(1, 5, 5, 16)
    with torch.no_grad():
        expected = ops.frozen_block(-x, *weights)
        assert relative_error(ops.frozen_block(torch._neg_view(x), *weights), expected) < 1e-5


def test_kernels_of_many_sizes_are_released(monkeypatch):
    """Kernels that have not run for long leave memory, and return when they run."""
    assert launching._kernel.cache_info().maxsize
    assert llvm._launch.cache_info().maxsize
    few = functools.lru_cache(2, typed=True)(launching._kernel.__wrapped__)
    monkeypatch.setattr(launching, "_kernel", few)
    monkeypatch.setattr(llvm, "_launch", functools.lru_cache(1)(llvm._launch.__wrapped__))
    engines = []
    for channels in (16, 32, 48, 64, 16):
        x, weight = torch.randn(1, 3, 9, channels), torch.randn(channels, 1, 7, 7)
        exact, eager = (reference.dwconv(x, weight, None, dtype=dtype) for dtype in (torch.float64, torch.float32))
        check((llvm.dwconv(x, weight, None), exact, eager))
        sizes = launching.DwconvSizes.of(channels, 7, 9)
        engines.append(weakref.ref(few(llvm.machine_for(channels), sizes).engine))
    gc.collect()
    assert [engine() is not None for engine in engines] == [False, False, False, True, True]
