"""The kernels of a training step's MLP of ConvNeXt V2 on an x86 CPU: values and gradients, equal bits, bad samples."""

import pytest
import torch
import torch.nn.functional as F
from drawn import drawn
from hypothesis import strategies as st
from support import draws_for, relative_error
from test_llvm import MACHINES
from test_llvm_mlp import check_results, orders, parameters

from convnext_fast import ConvNext, ConvNextV2Config
from convnext_fast.backends import reference
from convnext_fast.backends.cpu import llvm, llvm_mlp, response_norm
from convnext_fast.backends.cpu.mlp import row_scale
from convnext_fast.backends.cpu.response_norm import ResponseNorm

launching = pytest.importorskip("convnext_fast.kernels.cpu.launching", reason="needs llvmlite")
from convnext_fast.kernels.cpu.machine import AVX2  # noqa: E402

pytestmark = pytest.mark.skipif(not launching.has(AVX2), reason="these kernels need x86, Linux and AVX2")

NAMES = "y", "du", "dg", "dβ", "dw1", "db1", "dw2", "db2", "layer scale", "dγ of GRN", "dβ of GRN"


def draw(samples, pixels, channels, hidden, affine=True, beta=True, scaled=False, silent=0):
    """dy, u, residual and the parameters; the first ``silent`` hidden units are 0 everywhere."""
    norm, mlp = parameters(channels, hidden, affine, layer_scale=False)
    mlp.w1[:silent] = mlp.b1[:silent] = 0
    grn = ResponseNorm(torch.randn(hidden), torch.randn(hidden) if beta else None, pixels)
    scale = torch.rand(samples) + 0.5 if scaled else None
    return *torch.randn(3, samples * pixels, channels), norm, mlp, grn, scale


def plain(dtype, dy, u, residual, norm, mlp, grn, scale):
    """y and the gradients by autograd, None for those of absent parameters."""
    parameters = u, *norm[:2], *mlp[:5], *grn[:2]
    leaves = [t if t is None else t.to(dtype, copy=True).requires_grad_() for t in parameters]
    u, weight, bias, w1, b1, w2, b2, _, gamma, beta = leaves
    h = F.gelu(F.linear(F.layer_norm(u, u.shape[1:], weight, bias, norm.eps), w1, b1))
    h = h.view(-1, grn.pixels, 1, h.shape[1])
    z = F.linear(reference.global_response_norm(h, gamma, torch.zeros_like(gamma) if beta is None else beta), w2, b2)
    z = z if scale is None else scale.to(dtype).view(-1, 1, 1, 1) * z
    y = residual.to(dtype) + z.view(residual.shape)
    grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.to(dtype)))
    return [y, *(None if leaf is None else next(grads) for leaf in leaves)]


def ours(machine, dy, u, residual, norm, mlp, grn, scale, saves):
    scale = row_scale(scale, u)
    y, a, norms = llvm_mlp.mlp_fwd(machine, u, residual, norm, mlp, grn, scale, saves, overwrite=False)
    assert (a is not None) == saves
    assert norms.shape == (len(u) // grn.pixels, len(mlp.w1))
    return [y, *llvm_mlp.mlp_bwd(machine, dy, u, a, norm, mlp, grn, scale)]


def eager(order, dy, u, residual, *rest):
    """As `plain` in float32 with the pixels of each sample in another order, in which sums round differently."""
    y, du, *others = plain(torch.float32, dy[order], u[order], residual[order], *rest)
    back = order.argsort()
    return [y[back], du[back], *others]


def check(*draws):
    """(ours, the arguments) of each draw: the errors of all draws together, beside eager's in several orders."""

    def results(given_):
        _, u, *_, grn, _ = given_
        return plain(torch.float64, *given_), *(eager(order, *given_) for order in orders(len(u), grn.pixels))

    check_results(((got, *results(given_)) for got, given_ in draws), NAMES)


def same(got, expected):
    pairs = zip(got, expected, strict=True)
    return all(torch.equal(a, b) if isinstance(b, torch.Tensor) else a is b for a, b in pairs)


@pytest.mark.parametrize("machine", MACHINES)
@drawn(
    st.integers(1, 4),
    st.one_of(st.integers(1, 60), st.sampled_from([65, 196, 259])),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([0, 5]),
    *[st.booleans()] * 4,
    st.integers(1, 4),
    few=5,
    many=15,
)
def test_values_and_gradients(
    machine, samples, pixels, channels, ratio, silent, affine, beta, scaled, saves, team_size
):
    channels *= machine.lanes
    before, found = torch.get_num_threads(), []
    for _ in draws_for(min(samples * pixels, channels, ratio * channels - silent)):
        given_ = draw(samples, pixels, channels, ratio * channels, affine, beta, scaled, silent)
        try:
            torch.set_num_threads(team_size)
            found.append((ours(machine, *given_, saves), given_))
        finally:
            torch.set_num_threads(before)
    check(*found)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("samples", "pixels", "channels"), [(1, 3136, 96), (2, 196, 384), (3, 49, 768)])
def test_real_models(machine, samples, pixels, channels):
    given_ = draw(samples, pixels, channels, 4 * channels)
    check((ours(machine, *given_, True), given_))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("samples", "pixels", "channels"), [(5, 6, 48), (3, 196, 96), (5, 49, 512)])
def test_equal_bits_for_every_number_of_threads_level_and_block(
    machine, samples, pixels, channels, threads, monkeypatch
):
    given_ = draw(samples, pixels, channels, 4 * channels, scaled=True)
    threads(1)
    expected = ours(machine, *given_, True)
    for count in (1, 2, 3, 16):
        threads(count)
        for saves in (True, False):
            assert same(ours(machine, *given_, saves), expected)
    monkeypatch.setattr(response_norm, "_CACHE_BYTES", 1)  # each sample in a block of its own
    got = ours(machine, *given_, True)
    assert same(got[:2], expected[:2])
    check((got, given_))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_affects_only_its_sample(machine, bad):
    dy, u, *rest = draw(4, 10, 32, 64)
    u[23, 3] = bad
    y, du, *_ = ours(machine, dy, u, *rest, False)
    rows = torch.arange(40) // 10 == 2
    for result in (y, du):
        assert torch.equal(~result.isfinite().all(1), rows)


def test_supported_arguments():
    dy, u, _, norm, mlp, grn, _ = draw(2, 5, 32, 64)
    assert llvm_mlp.machine_for((dy, u), mlp, norm, grn) is not None
    for other, response in (
        (mlp._replace(gamma=torch.ones(32)), grn),
        (mlp._replace(act="silu"), grn),
        (mlp, grn._replace(gamma=grn.gamma.double())),
        (mlp, grn._replace(beta=grn.beta.half())),
    ):
        assert llvm_mlp.machine_for((dy, u), other, norm, response) is None


@pytest.mark.parametrize("serving", [True, False])
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_models_in_training_run_them(serving, recompute, monkeypatch):
    config = ConvNextV2Config(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, num_labels=3, recompute=recompute)
    model, called, grads = ConvNext(config), [], []
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter.data, std=0.5 if "grn" in name else 0.2)
    for name in ("mlp_fwd", "mlp_bwd"):
        real = getattr(llvm_mlp, name)
        monkeypatch.setattr(llvm_mlp, name, lambda *a, r=real, n=name: called.append(n) or r(*a))
    if not serving:
        monkeypatch.setattr(llvm, "machine_for", lambda *_: None)
    x = torch.randn(2, 3, 32, 40)
    for fused in (False, True):
        model.fused = fused
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(relative_error(got, expected) < 1e-4 for expected, got in zip(*grads, strict=True))
    assert len(called) == (6 if serving else 0)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("scaled", [True, False])
def test_the_result_may_take_the_place_of_u(machine, scaled):
    _, u, residual, norm, mlp, grn, scale = draw(5, 26, 32, 64, scaled=scaled)
    rest = residual, norm, mlp, grn, row_scale(scale, u), False
    expected, *_ = llvm_mlp.mlp_fwd(machine, u, *rest, overwrite=False)
    y, *_ = llvm_mlp.mlp_fwd(machine, u, *rest, overwrite=True)
    assert y.data_ptr() == u.data_ptr()
    assert torch.equal(y, expected)
