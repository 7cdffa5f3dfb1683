"""Users may treat the fused ops like PyTorch's own layers: change results, batch cotangents, …"""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support import BOUNDS, gradients, randomise, relative_error
from torch import nn
from transformers import ConvNextConfig as HostConfig
from transformers import ConvNextModel as Host

from convnext_fast import ConvNext, ConvNextConfig, fuse, ops
from convnext_fast.ops import arguments

CONFIG = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[2, 1], num_labels=5)
BOUND = BOUNDS[torch.float64]


def pair(dtype=torch.float64):
    """A model and its plain reference with the same parameters, γ from N(0, 1)."""
    model = randomise(ConvNext(CONFIG)).to(dtype).eval()
    plain = ConvNext(CONFIG, fused=False).to(dtype).eval()
    plain.load_state_dict(model.state_dict())
    return model, plain


def images(dtype=torch.float64):
    return torch.randn(2, 3, 20, 24, dtype=dtype, generator=torch.Generator().manual_seed(0))


def changed_in_place(model, x):
    """Every kind of result, changed in place before the next layer runs."""
    y = model.stem(x).mul_(2)
    for stage in model.stages:
        y = stage.downsample(y)
        y += 1
        for block in stage.blocks:
            y = block(y).mul_(2)
            y[:, :, 0] = 0
    return y


def test_results_may_be_changed_in_place():
    model, plain = pair()
    x = images().requires_grad_()
    ours, theirs = (gradients(m, [changed_in_place(m, x)], [x]) for m in (model, plain))
    assert all(relative_error(ours[k], v) <= BOUND for k, v in theirs.items() if v is not None)


@pytest.mark.parametrize("frozen", [False, True])
def test_results_without_gradients_may_be_changed_in_place_with_them(frozen):
    model, plain = pair()
    if frozen:
        model.freeze()
    found = []
    for each in (model, plain):
        shift = torch.ones(16, 1, 1, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            y = each.forward_features(images())
        y.mul_(shift)
        found.append(torch.autograd.grad(y.square().sum(), shift)[0])
    assert relative_error(*found) <= BOUND


def test_ops_alone_may_be_changed_in_place():
    x = torch.randn(2, 5, 4, 6, requires_grad=True)
    w1, w2, affine = torch.randn(24, 6), torch.randn(6, 24), (torch.randn(6), torch.randn(6))
    dwconv, mlp = (torch.randn(6, 1, 7, 7), None), (w1, torch.randn(24), w2, torch.randn(6))
    for y in (
        ops.convnext_block(x, *dwconv, *affine, *mlp),
        ops.dwconv_layernorm(x, *dwconv, *affine),
        ops.pointwise_mlp(x, x, *mlp),
        ops.pointwise_mlp(x, None, *mlp),
        ops.downsample(x, *affine, torch.randn(9, 6, 2, 2), None),
    ):
        y.mul_(2).sum().backward()


def test_a_fused_host():
    host = randomise(Host(HostConfig(num_stages=2, hidden_sizes=[8, 16], depths=[2, 1]))).double().eval()
    fused = fuse(copy.deepcopy(host)).model
    layers = [(type(m).__name__, name) for name, m in host.named_modules()]
    found = []
    for model in (host, fused):
        for kind, name in layers:
            if kind in ("ConvNextLayer", "ConvNextStage", "ConvNextEmbeddings"):
                model.get_submodule(name).register_forward_hook(lambda module, args, output: output.mul_(2))
        x = images().requires_grad_()
        y = model(x).last_hidden_state
        (grad,) = torch.autograd.grad(y, x, y.cos().detach())
        with forward_ad.dual_level(), torch.no_grad():
            dual = model(forward_ad.make_dual(images(), images().flip(2))).last_hidden_state
            tangent = forward_ad.unpack_dual(dual).tangent
        found.append([y, grad, tangent])
        assert model.to("meta")(images().to("meta")).last_hidden_state.shape == y.shape
    assert all(relative_error(a, b) <= BOUND for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_meta_device(frozen):
    model = ConvNext(CONFIG).eval()
    if frozen:
        model.freeze()
    model.to("meta")
    assert model(images(torch.float32).to("meta")).shape == (2, 5)
    assert model.backend_for(images().to("meta")) == "reference"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode(frozen, grad):
    model, plain = pair()
    if frozen:
        model.freeze()
    x, v = images(), images().flip(2)
    expected = torch.func.jvp(plain, (x,), (v,))[1]
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent
    assert relative_error(tangent, expected) <= BOUND


def test_batches_of_cotangents_are_refused_by_name():
    model, _ = pair()
    x, cotangents = images().requires_grad_(), torch.randn(3, 2, 5, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="cannot take a batch of output gradients"):
        torch.autograd.grad(model(x), x, cotangents, is_grads_batched=True)
    y = model(x)
    with pytest.raises(NotImplementedError, match="cannot take a batch of output gradients"):
        torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True))(cotangents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_a_frozen_models_maps(dtype):
    model, plain = pair(torch.float32)
    model.freeze()
    with torch.autocast("cpu", dtype), torch.no_grad():
        ours, theirs = model.forward_features(images(torch.float32)), plain.forward_features(images(torch.float32))
    assert ours.dtype == theirs.dtype == torch.float32


def test_a_trace_leaves_nothing_behind():
    model = ConvNext(CONFIG).eval().freeze()
    before = len(arguments._PASSED)
    with torch.no_grad():
        torch.jit.trace(model, images(torch.float32), check_trace=False)
    assert len(arguments._PASSED) == before


def test_an_inplace_activation_after_a_backbone():
    model = nn.Sequential(ConvNext(CONFIG, num_classes=0), nn.ReLU(inplace=True))
    model(images(torch.float32)).sum().backward()
