"""What a compiler makes of the convolution: an operator that launches the form with explicit layouts, as eager does."""

import pytest
import torch
from convnext_fast.kernels.dwconv.gluon import AVAILABLE
from dwconv_cases import draw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from convnext_fast.backends.dwconv import dwconv, dwconv_dgrad, dwconv_fwd, dwconv_wgrad_sums

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Gluon as Triton has it from 3.6 on")
SHAPE = (2, 9, 10, 40)
OPERATOR = torch.ops.convnext_fast.dwconv.default


def step(x, weight, bias, du, dy):
    u, stats = dwconv_fwd(x, weight, bias, du.dtype)
    return u, stats, dwconv_dgrad(du, weight, dy, dy.dtype)


def test_a_traced_graph_holds_the_operator_and_gives_what_eager_gives(emulating):
    tensors = draw(SHAPE, 7, torch.float16)
    graph = make_fx(step, tracing_mode="fake")(*tensors)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(OPERATOR) == 2
    assert not any("triton_kernel_wrapper" in str(target) for target in called)
    with emulating(arch=80) as emulation:
        compiled = graph(*tensors)
        eager = step(*tensors)
    assert [launch.kernel for launch in emulation.launches] == ["dwconv_gluon_kernel"] * 4
    for got, wanted in zip(compiled, eager, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_dynamic_batches_and_sides_keep_one_graph(emulating):
    graph = make_fx(step, tracing_mode="symbolic")(*draw(SHAPE, 7, torch.float16))
    other = draw((3, 7, 12, 40), 7, torch.float16)
    with emulating(arch=80):
        assert all(torch.equal(got, wanted) for got, wanted in zip(graph(*other), step(*other), strict=True))


@pytest.mark.parametrize("statistics", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_fake_results_are_like_real_ones(emulating, statistics):
    x, weight, bias, _, _ = draw(SHAPE, 7, torch.float16)
    with emulating(arch=80):
        torch.library.opcheck(
            dwconv, (x, weight, bias, None, torch.float16, torch.float32, not statistics, statistics),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_a_tensor_that_is_not_aligned_takes_the_portable_form(emulating):
    x, weight, bias, _, _ = draw(SHAPE, 7, torch.float16)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(SHAPE).copy_(x)
    with emulating(arch=80, bounds="storage") as emulation:
        u, _ = dwconv(shifted, weight, bias, None, x.dtype, x.dtype, False, True)
        wanted, _ = dwconv_fwd(x, weight, bias, x.dtype)
    assert [launch.kernel for launch in emulation.launches] == ["dwconv_tensor_core_kernel", "dwconv_gluon_kernel"]
    assert (u - wanted).abs().max() <= 4 * torch.finfo(x.dtype).eps * wanted.abs().max()


def test_weight_gradient_of_tensors_that_are_not_aligned(emulating):
    """They are copied, because the compiler was told the shape of the sums."""
    x, _, _, du, _ = draw(SHAPE, 7, torch.float16)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(SHAPE).copy_(x)
    with emulating(arch=80) as emulation:
        torch.library.opcheck(dwconv_wgrad_sums, (x, du, 7), test_utils=("test_schema", "test_faketensor"))
        wanted, got = (dwconv_wgrad_sums(t, du, 7)[..., :7, :] for t in (x, shifted))
    assert {launch.kernel for launch in emulation.launches} == {"dwconv_wgrad_gluon_kernel"}
    assert torch.equal(got, wanted)


def test_channels_that_are_no_multiple_of_8_are_traced_in_the_portable_form():
    with FakeTensorMode():
        tensors = draw((2, 9, 10, 36), 7, torch.float16)
    graph = make_fx(step, tracing_mode="fake")(*[torch.zeros(t.shape, dtype=t.dtype) for t in tensors])
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("triton_kernel_wrapper" in target for target in called) == 2
    assert OPERATOR not in called
