"""Element indices beyond 2^31 in the wide MLP's backward and in patchify's: the last program of each launch."""

import pytest
import torch
import torch.nn.functional as F
from convnext_fast.kernels.mlp import gemm_bwd
from convnext_fast.kernels.mlp.gemm_bwd import gemm_mlp_bwd
from convnext_fast.kernels.mlp.output_grad import output_grad
from convnext_fast.kernels.mlp.tuning import GemmConfig
from convnext_fast.kernels.patchify import bwd
from convnext_fast.kernels.patchify.bwd import downsample_bwd, stem_bwd
from kernel_support import assert_as_good_as_eager
from test_far_offsets_mlp import EPS, TAIL, C, K, P, far, given  # noqa: F401 (given is a fixture)

DTYPES = torch.float16, torch.float64
STEP = GemmConfig(32, 64, 16, 4, 1)


@pytest.fixture
def hidden(allocated):
    """The allocations of the wide backward: its tensors of P rows end in ``TAIL`` rows of data."""

    def prepare(tensor):
        if tensor.dim() == 3 and tensor.shape[1] == P:
            tensor[:, -TAIL:] = torch.randn(tensor.shape[0], TAIL, tensor.shape[2])

    allocated.prepare = prepare
    return allocated


def normalised(u):
    """(x̂, rstd) of the last rows."""
    rstd = (u.double().var(1, correction=0, keepdim=True) + EPS).rsqrt().to(u.dtype)
    return F.layer_norm(u, (u.shape[1],), eps=EPS), rstd


def test_gradient_of_the_output(given):  # noqa: F811
    dy = given[2]
    dz, _ = output_grad(dy, torch.tensor([0.5]), torch.float16)
    assert torch.equal(dz[-TAIL:, -1], dy[-TAIL:, -1] * 0.5)


def test_hidden_gradient(given, hidden):  # noqa: F811
    u, stats, dy, w1, b1g, w2 = given
    gemm_mlp_bwd(dy, u, stats, None, w1, b1g, w2, None, EPS, "gelu")
    results = []
    for dtype in DTYPES:
        x, rstd = normalised(u[-TAIL:].to(dtype))
        a = F.linear(x, w1.to(dtype), b1g[0].to(dtype)).requires_grad_()
        h = F.gelu(a)
        (da,) = torch.autograd.grad(h, a, dy[-TAIL:].to(dtype) @ w2.to(dtype))
        results.append((h.detach(), rstd * da))
    for got, eager, want in zip(hidden[0], *results, strict=True):
        assert_as_good_as_eager(got[-TAIL:], eager, want)


@pytest.mark.parametrize("last_program", [1], indirect=True)
def test_input_gradient(given, hidden):  # noqa: F811
    u, stats, dy, w1, b1g, w2 = given
    du, _ = gemm_mlp_bwd(dy, u, stats, None, w1, b1g, w2, None, EPS, "gelu")
    da = hidden[0][1, -TAIL:]
    means = next(tensor for tensor in hidden if tensor.shape == (1, P, 2))[0, -TAIL:]
    results = []
    for dtype in DTYPES:
        x, _ = normalised(u[-TAIL:].to(dtype))
        total, along = means.to(dtype).split(1, dim=1)
        results.append(da.to(dtype) @ w1.to(dtype) - total / C - x * along / C)
    assert_as_good_as_eager(du[-TAIL:], *results)


@pytest.mark.parametrize("last_program", [2], indirect=True)
def test_weight_gradient(given, hidden, monkeypatch):  # noqa: F811
    u, stats, dy, w1, b1g, w2 = given
    # The rows before the tail in a share of 1,024 rows hold zeros.
    monkeypatch.setattr(gemm_bwd, "weight_grad_config", lambda *_: (GemmConfig(64, 64, 32, 4, 1), 1024))
    _, sums = gemm_mlp_bwd(dy, u, stats, None, w1, b1g, w2, None, EPS, "gelu")
    eager, want = (hidden[0][0, -TAIL:].to(dtype).t() @ dy[-TAIL:].to(dtype) for dtype in DTYPES)
    assert_as_good_as_eager(sums.products[1, -1], eager, want, terms=TAIL)


def test_stem(last_program, allocated, monkeypatch):
    monkeypatch.setattr(bwd, "stem_bwd_config", lambda *_: (STEP, 64, 1024))
    image, dout = far(last_program, (P, 5, 4, 4), 0), far(last_program, (P, 1, 1, C), 1)
    torch.manual_seed(2)
    weight, bias, ln_weight = torch.randn(C, 5, 4, 4) / 9, torch.randn(C), torch.randn(C)
    dimage, *_ = stem_bwd(dout, image, weight, bias, ln_weight, ln_weight, EPS, torch.float16, needs_image=True)
    results = []
    for dtype in DTYPES:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (image[-TAIL:], weight)]
        u = F.conv2d(*leaves, bias.to(dtype)).flatten(1)
        y = F.layer_norm(u, (C,), ln_weight.to(dtype), eps=EPS)
        results.append(torch.autograd.grad(y, leaves, dout[-TAIL:].flatten(1).to(dtype)))
    # The last program has the last 16 of the 80 elements of a patch: its last channel.
    got = dimage[-TAIL:], allocated[-1][-1, : C * 80].view(C, 5, 4, 4)
    for ours, eager, want in zip(got, *results, strict=True):
        assert_as_good_as_eager(ours[:, 4], eager[:, 4], want[:, 4], terms=TAIL)


@pytest.fixture
def downsampling(last_program, monkeypatch):
    images, wide = 2**31 // (4 * C) + TAIL, 4 * C
    x, dout = far(last_program, (images, 2, 2, C), 0), far(last_program, (images, 1, 1, wide), 1)
    torch.manual_seed(2)
    weight = torch.randn(wide, C, 2, 2) / 16
    folded = weight.permute(0, 2, 3, 1).half().contiguous(), None
    monkeypatch.setattr(bwd, "fold_downsample", lambda *_: folded)
    one = torch.ones(C)
    return lambda: downsample_bwd(dout, x, weight, None, one, one, EPS, torch.float16), x, dout, folded[0]


@pytest.mark.parametrize("last_program", [1], indirect=True)
def test_input_gradient_of_downsampling(downsampling):
    run, x, dout, weight = downsampling
    dx = run()[0]
    results = []
    for dtype in DTYPES:
        leaf = x[-TAIL:, 1, 1].to(dtype).detach().requires_grad_()
        y = F.linear(F.layer_norm(leaf, (C,), eps=EPS), weight[:, 1, 1].to(dtype))
        results += torch.autograd.grad(y, leaf, dout[-TAIL:].flatten(1).to(dtype))
    assert_as_good_as_eager(dx[-TAIL:, 1, 1], *results)


@pytest.mark.parametrize("last_program", [2], indirect=True)
def test_weight_gradient_of_downsampling(downsampling, allocated, monkeypatch):
    run, x, dout, _ = downsampling
    monkeypatch.setattr(bwd, "downsample_weight_config", lambda *_: (GemmConfig(64, 64, 32, 4, 1), 4096))
    last = x[-TAIL:, 1, 1].float()

    def prepare(tensor):
        if tensor.shape == (4, x.shape[0], C):  # x̂ of every tap and patch
            tensor[3, -TAIL:] = F.layer_norm(last, (C,), eps=EPS)

    allocated.prepare = prepare
    run()
    products = next(tensor for tensor in allocated if tensor.shape[1:] == (4 * C, 4, C))
    eager, want = (
        dout[-TAIL:].flatten(1).to(dtype).t() @ F.layer_norm(x[-TAIL:, 1, 1].to(dtype), (C,), eps=EPS)
        for dtype in DTYPES
    )
    assert_as_good_as_eager(products[-1, -64:, 3], eager[-64:], want[-64:], terms=TAIL)
