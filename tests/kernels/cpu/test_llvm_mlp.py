"""The kernels of a training step's MLP on an x86 CPU: values and gradients at all sizes, equal bits, bad rows."""

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn
from hypothesis import strategies as st
from support import draws_for, no_worse_together, relative_error
from test_llvm import MACHINES
from torch.utils._python_dispatch import TorchDispatchMode

from convnext_fast.backends.cpu import llvm, llvm_mlp
from convnext_fast.backends.cpu import mlp as cpu_mlp
from convnext_fast.backends.cpu.aten_layers import Mlp, Norm

launching = pytest.importorskip("convnext_fast.kernels.cpu.launching", reason="needs llvmlite")
from convnext_fast.kernels.cpu.machine import AVX2, AVX512  # noqa: E402

pytestmark = pytest.mark.skipif(not launching.has(AVX2), reason="these kernels need x86, Linux and AVX2")

NAMES = "y", "du", "dg", "dβ", "dw1", "db1", "dw2", "db2", "dγ"


def parameters(channels, hidden, affine=True, layer_scale=True):
    norm = Norm(*(torch.randn(2, channels) if affine else (None, None)), 1e-6)
    w1, w2 = torch.randn(hidden, channels) / channels**0.5, torch.randn(channels, hidden) / hidden**0.5
    gamma = torch.randn(channels) if layer_scale else None
    return norm, Mlp(w1, torch.randn(hidden), w2, torch.randn(channels), gamma, "gelu")


def plain(dtype, dy, u, residual, norm, mlp, scale):
    """y and the gradients by autograd, None for those of absent parameters."""
    leaves = [t if t is None else t.to(dtype, copy=True).requires_grad_() for t in (u, *norm[:2], *mlp[:5])]
    u, weight, bias, w1, b1, w2, b2, gamma = leaves
    z = F.linear(F.gelu(F.linear(F.layer_norm(u, u.shape[1:], weight, bias, norm.eps), w1, b1)), w2, b2)
    z = z if gamma is None else gamma * z
    y = residual.to(dtype) + (z if scale is None else scale.to(dtype) * z)
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(y, wanted, dy.to(dtype)))
    return [y, *(None if leaf is None else next(grads) for leaf in leaves)]


def ours(machine, dy, u, residual, norm, mlp, scale, saves):
    y, a, _ = llvm_mlp.mlp_fwd(machine, u, residual, norm, mlp, None, scale, saves, overwrite=False)
    assert (a is not None) == saves
    return [y, *llvm_mlp.mlp_bwd(machine, dy, u, a, norm, mlp, None, scale)[:8]]


def eager(order, dy, u, residual, norm, mlp, scale):
    """As `plain` in float32 with the rows in another order, in which sums round differently."""
    scale = scale if scale is None else scale[order]
    y, du, *others = plain(torch.float32, dy[order], u[order], residual[order], norm, mlp, scale)
    back = order.argsort()
    return [y[back], du[back], *others]


def check(*draws):
    """(ours, the arguments) of each draw: the errors of all draws together, beside eager's in several orders."""
    check_results(
        (got, plain(torch.float64, *given_), *(eager(order, *given_) for order in orders(len(given_[1]))))
        for got, given_ in draws
    )


def orders(rows, sample=None):
    """Three orders of the rows, first the given one; sums of many rows are so long that one order is enough.

    ``sample``: rows that stay together.
    """
    yield torch.arange(rows)
    for _ in range(2 if rows < 1000 else 0):
        yield torch.cat([start + torch.randperm(sample or rows) for start in range(0, rows, sample or rows)])


def check_results(draws, names=NAMES):
    """(ours, float64's, eager's, …) of each draw, each a list of tensors with these names, None for absent ones."""
    for name, *each in zip(names, *(zip(*kinds, strict=True) for kinds in draws), strict=True):
        if each[0][1] is None:
            assert each[0][0] is None or name == "dβ of GRN", name
        else:
            assert all(got.is_contiguous() for got, *_ in each), name
            assert no_worse_together(each), name


@pytest.mark.parametrize("machine", MACHINES)
@drawn(
    st.one_of(st.integers(1, 60), st.sampled_from([111, 112, 113, 224, 500, 897])),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([1, 3, 4]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
    few=5,
    many=15,
)
def test_values_and_gradients(machine, rows, channels, ratio, affine, layer_scale, scaled, saves, team_size):
    channels *= machine.lanes
    before, found = torch.get_num_threads(), []
    for _ in draws_for(min(rows, channels)):
        scale = torch.rand(rows, 1) + 0.5 if scaled else None
        given_ = *torch.randn(3, rows, channels), *parameters(channels, ratio * channels, affine, layer_scale), scale
        try:
            torch.set_num_threads(team_size)
            found.append((ours(machine, *given_, saves), given_))
        finally:
            torch.set_num_threads(before)
    check(*found)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("channels", "rows"), [(96, 3136), (384, 784), (768, 98)])
def test_real_models(machine, channels, rows):
    """Products of real depth, and a mean far from zero."""
    dy, u, residual = torch.randn(3, rows, channels)
    given_ = dy, u + 5, residual, *parameters(channels, 4 * channels), None
    check((ours(machine, *given_, True), given_))


@pytest.mark.parametrize("machine", MACHINES)
def test_sums_over_many_pixels(machine):
    """No chain of additions is long: the gradients of 100,000 pixels, which do not cancel, as exact as eager's."""
    dy, u, residual = torch.rand(3, 100_352, machine.lanes)
    given_ = dy + 0.5, u, residual, *parameters(machine.lanes, machine.lanes), None
    check((ours(machine, *given_, False), given_))


class Memory(TorchDispatchMode):
    """The bytes of the largest tensor that is made and is not a result."""

    def __init__(self, results):
        super().__init__()
        self.results, self.largest = results, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        makes = function in (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)
        if makes and made.shape not in self.results:
            self.largest = max(self.largest, made.numel() * made.element_size())
        return made


@pytest.mark.parametrize(("channels", "rows"), [(1024, 4096), (48, 60_000)])
def test_memory_of_the_backward_does_not_depend_on_the_batch(channels, rows):
    norm, mlp = parameters(channels, 2 * channels)
    dy, u = torch.randn(2, rows, channels)
    with Memory({u.shape, mlp.w1.shape, mlp.w2.shape}) as memory:
        llvm_mlp.mlp_bwd(AVX2, dy, u, None, norm, mlp, None, None)
    assert 1 << 20 < memory.largest < 32 << 20


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("saves", [True, False])
def test_blocks_of_rows_add_up(machine, saves, monkeypatch):
    """The backward's blocks, the last one not whole, with a factor for each row."""
    monkeypatch.setattr(llvm_mlp, "row_blocks", lambda rows, *_: [slice(0, 60), slice(60, 120), slice(120, rows)])
    given_ = *torch.randn(3, 170, 48), *parameters(48, 96), torch.rand(170, 1)
    check((ours(machine, *given_, saves), given_))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("channels", "rows"), [(48, 30), (96, 700), (512, 450)])
def test_equal_bits_for_every_number_of_threads_and_level(machine, channels, rows, threads):
    given_ = *torch.randn(3, rows, channels), *parameters(channels, 4 * channels), torch.rand(rows, 1)
    threads(1)
    expected = ours(machine, *given_, True)
    for count in (1, 2, 3, 16):
        threads(count)
        for saves in (True, False):
            assert all(map(torch.equal, ours(machine, *given_, saves), expected))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_row_affects_only_itself(machine, bad):
    dy, u, residual = torch.randn(3, 40, 32)
    u[20, 3] = bad
    y, du, *sums = ours(machine, dy, u, residual, *parameters(32, 64), None, False)
    row = torch.arange(40) == 20
    for result in (y, du):
        assert torch.equal(~result.isfinite().all(1), row)
    assert not any(total.isfinite().all() for total in sums[:-2])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("shape", [(96, 64), (48, 80), (16, 16)])
def test_weights_are_packed_as_for_frozen_models(machine, shape):
    weight, scale = torch.randn(*shape), torch.randn(shape[0], 2)[:, 0]
    for factor in (None, scale):
        scaled = weight if factor is None else factor[:, None] * weight
        for transposed in (True, False):
            expected = launching.pack(scaled if transposed else scaled.t(), machine)
            got = llvm_mlp.pack(machine, weight.t().contiguous().t(), factor, transposed)
            assert torch.equal(got.flatten(), expected)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("scaled", [True, False])
def test_the_result_may_take_the_place_of_u(machine, scaled):
    (u, residual), (norm, mlp) = torch.randn(2, 130, 32), parameters(32, 64)
    scale = torch.rand(130, 1) if scaled else None
    expected, *_ = llvm_mlp.mlp_fwd(machine, u, residual, norm, mlp, None, scale, False, overwrite=False)
    y, *_ = llvm_mlp.mlp_fwd(machine, u, residual, norm, mlp, None, scale, False, overwrite=True)
    assert y.data_ptr() == u.data_ptr()
    assert torch.equal(y, expected)


def strided(tensor):
    """The same values, in every second number of a memory."""
    return torch.stack((tensor, torch.full_like(tensor, float("nan"))), -1)[..., 0]


@pytest.mark.parametrize("serving", [True, False])
@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("dimensions", [(1,), (2,), (1, 2)])
def test_parameters_of_any_strides(serving, layer_scale, dimensions, monkeypatch):
    if not serving:
        monkeypatch.setattr(llvm, "machine_for", lambda *_: None)
    (dy, u, residual), (norm, mlp) = torch.randn(3, 60, 32), parameters(32, 64, layer_scale=layer_scale)
    mlp = mlp._replace(b1=torch.ones(1).expand(64))

    def step(change):
        odd = Norm(*map(change, norm[:2]), norm.eps), Mlp(*(None if t is None else change(t) for t in mlp[:5]), mlp.act)
        y, a, _ = cpu_mlp.mlp_fwd(u, residual, *odd, None, change(torch.ones(3)), save_hidden=True)
        return [y, *cpu_mlp.mlp_bwd(dy, u, a, *odd, None, change(torch.ones(3)))]

    def some(tensor):
        return strided(tensor) if tensor.dim() in dimensions else tensor.contiguous()

    for got, expected in zip(step(some), step(torch.Tensor.contiguous), strict=True):
        assert (got is None) == (expected is None)
        assert got is None or relative_error(got, expected) < 1e-6


def test_supported_arguments():
    norm, mlp = parameters(32, 64)
    x = torch.randn(5, 32)
    assert llvm_mlp.machine_for((x, None, x), mlp, norm) in (AVX2, AVX512)
    for rows, other, normed in (
        ((x.double(),), mlp, norm),
        ((x[:0],), mlp, norm),
        ((x.t().contiguous().t(),), mlp, norm),
        ((x,), mlp._replace(act="silu"), norm),
        ((x,), mlp._replace(w2=mlp.w2.double()), norm),
        ((x,), mlp, None),
        ((x,), mlp, norm._replace(bias=norm.weight.half())),
        ((torch._neg_view(x),), mlp, norm),
        ((torch.randn(5, 12),), parameters(12, 48)[1], parameters(12, 48)[0]),
    ):
        assert llvm_mlp.machine_for(rows, other, normed) is None


@pytest.mark.parametrize("serving", [True, False])
@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_both_ways_with_factors_of_samples(serving, saves, samples, monkeypatch):
    """What `aten_rows` calls, with the kernels and with ATen's calls."""
    if not serving:
        monkeypatch.setattr(llvm, "machine_for", lambda *_: None)
    called = []
    for name in ("mlp_fwd", "mlp_bwd"):
        real = getattr(llvm_mlp, name)
        monkeypatch.setattr(llvm_mlp, name, lambda *a, r=real, n=name: called.append(n) or r(*a))
    (dy, u, residual), (norm, mlp), factors = torch.randn(3, 60, 32), parameters(32, 64), torch.rand(samples) + 0.5
    y, a, _ = cpu_mlp.mlp_fwd(u, residual, norm, mlp, None, factors, save_hidden=saves)
    got = [y, *cpu_mlp.mlp_bwd(dy, u, a, norm, mlp, None, factors)[:8]]
    check((got, (dy, u, residual, norm, mlp, factors.repeat_interleave(60 // samples)[:, None])))
    assert called == (["mlp_fwd", "mlp_bwd"] if serving else [])


@pytest.mark.parametrize(("channels", "rows", "pays"), [(512, 383, False), (512, 384, True), (504, 1, True)])
def test_a_wide_layer_is_packed_only_for_many_rows(channels, rows, pays, monkeypatch):
    called = []
    monkeypatch.setattr(llvm_mlp, "mlp_fwd", lambda *_: called.append(1) or (None, None, None))
    x, (norm, mlp) = torch.randn(rows, channels), parameters(channels, 4 * channels)
    cpu_mlp.mlp_fwd(x, x, norm, mlp, None, None)
    assert bool(called) is pays
