"""Frozen models: what is folded, and correct results after every way to move, copy, compile or export one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from convnext_fast.kernels.weights import FrozenBlock, FrozenDownsample
from frozen_support import folded_weights
from support import BOUNDS, randomise, relative_error

from convnext_fast import ConvNext, ConvNextConfig, ConvNextForImageClassification, ops
from convnext_fast.models.freezing import is_frozen
from convnext_fast.ops.operators import OPERATORS

CONFIG = {"num_stages": 2, "hidden_sizes": [8, 12], "depths": [1, 2], "num_labels": 5}


def model_of(dtype=torch.float32, made=ConvNext):
    return randomise(made(ConvNextConfig(**CONFIG), dtype=dtype)).eval()


def image(dtype=torch.float32):
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(2)).to(dtype)


def logits(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def folded(model):
    """The tensors that the frozen blocks and downsampling layers of a model compute with, by name."""
    found = {name: folded_weights(module) for name, module in model.named_modules() if is_frozen(module)}
    frozen = {name: weights for name, weights in found.items() if isinstance(weights, (FrozenBlock, FrozenDownsample))}
    fields = [(f"{name}.{field}", t) for name, weights in frozen.items() for field, t in weights._asdict().items()]
    return {name: t for name, t in fields if t is not None}


@pytest.mark.parametrize("made", [ConvNext, ConvNextForImageClassification])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_speed_changes(made, dtype):
    model = model_of(dtype, made)
    expected, keys = logits(model, image(dtype)), list(model.state_dict())
    model.freeze()
    assert len(folded(model)) == 3 * 6 + 2
    assert not list(model.buffers())
    assert relative_error(logits(model, image(dtype)), expected) <= BOUNDS[dtype]
    assert list(model.state_dict()) == keys
    assert model.state_dict().keys() == model_of(dtype, made).state_dict().keys()
    model.unfreeze()
    assert not folded(model)
    assert torch.equal(logits(model, image(dtype)), expected)


def test_folded_weights_are_copies():
    """Without γ too, a frozen model computes with tensors that share no memory with any parameter."""
    model = model_of(torch.float64)
    for block in model.blocks():
        block.gamma = None
    expected = model(image(torch.float64))
    model.freeze()
    memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not any(tensor.untyped_storage().data_ptr() in memory for tensor in folded(model).values())
    assert relative_error(model(image(torch.float64)), expected) <= BOUNDS[torch.float64]


@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float64)],
)
def test_a_change_of_dtype_folds_again(before, after):
    """Also a change to the same dtype: biases stay in the wider dtype, row sums are those of the folded weights."""
    model = model_of(before).freeze().to(after)
    wide = torch.promote_types(after, torch.float32)
    fresh = model_of(before).to(after).freeze()
    for (name, got), want in zip(folded(model).items(), folded(fresh).values(), strict=True):
        assert got.dtype == (wide if name.endswith(("b1", "b2", "downsample.bias")) else after), name
        assert torch.equal(got, want), name
    for block in model.blocks():
        weights = folded_weights(block)
        assert torch.equal(weights.b1[1], weights.w1.sum(1, dtype=wide))
    assert torch.equal(model(image(after)), fresh(image(after)))


def test_parameters_changed_before_a_move_show():
    model, other = model_of().freeze(), model_of()
    model(image())
    for each in (model, other):
        with torch.no_grad():
            each.blocks()[0].norm.weight.zero_()
    moved = model.to("cpu").to(memory_format=torch.channels_last)
    assert relative_error(moved(image()), other(image())) <= BOUNDS[torch.float32]


def test_autocast_of_frozen_float32_weights():
    """Weights are folded and rounded on every call: errors are at most twice the unfrozen model's under autocast."""
    model = model_of()
    exact = copy.deepcopy(model).double()(image(torch.float64))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        live = model(image())
        frozen = model.freeze()(image())
    assert frozen.dtype == live.dtype
    assert relative_error(frozen, exact) <= 2 * relative_error(live, exact)
    assert relative_error(frozen, exact) > 1e-4


def test_copies_and_pickles():
    model = model_of().freeze()
    expected = model(image())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert folded(again).keys() == folded(model).keys()
        assert torch.equal(again(image()), expected)
        again.train()
        assert not folded(again)
        assert folded(model)


def test_gradients_of_the_input():
    model = model_of(torch.float64)
    x = image(torch.float64).requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    model.freeze()
    y = model(x)
    assert y.requires_grad
    assert relative_error(torch.autograd.grad(y.square().sum(), x)[0], want) <= BOUNDS[torch.float64]
    assert not model(x.detach()).requires_grad


def test_compiles_where_a_gradient_of_the_input_is_wanted():
    model = model_of(torch.float64).freeze()
    x = image(torch.float64).requires_grad_()
    actual = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")(x)
    expected = model(x)
    assert relative_error(actual, expected) <= BOUNDS[torch.float64]
    cotangent = torch.randn(actual.shape, dtype=torch.float64)
    got, want = (torch.autograd.grad(y, x, cotangent)[0] for y in (actual, expected))
    assert relative_error(got, want) <= BOUNDS[torch.float64]


def test_exports():
    model = model_of().freeze()
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    x = torch.randn(5, 3, 16, 24)
    assert relative_error(program.module()(x), model(x)) <= BOUNDS[torch.float32]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_traces_the_reference():
    model = model_of().freeze().to(torch.bfloat16)
    traced = torch.jit.trace(model, image(torch.bfloat16), check_trace=False)
    assert traced(image(torch.bfloat16)).dtype == torch.bfloat16


def test_opcheck():
    block = model_of().freeze().blocks()[0]
    x = torch.randn(2, 5, 4, 8)
    arguments = (x, *folded_weights(block), 1e-6, "gelu", torch.float32)
    torch.library.opcheck(OPERATORS["frozen_block_fwd"], arguments)


@pytest.mark.parametrize("gradients", [True, False])
def test_bad_operands_are_named(gradients):
    """Also after valid ones, which are not checked again if no gradients are wanted."""
    block, shrink = (model := model_of().freeze()).blocks()[0], model.stages[1].downsample
    x = torch.randn(2, 5, 4, 8)
    *weights, w1, b1, w2, b2, _ = folded_weights(block)
    with torch.set_grad_enabled(gradients):
        ops.frozen_block(x, *weights, w1, b1, w2, b2)
        check_bad_operands(x, weights, w1, b1, w2, b2, shrink)


def check_bad_operands(x, weights, w1, b1, w2, b2, shrink):
    with pytest.raises(ValueError, match=r"b1 has shape \(32,\): expected \(2, 32\)"):
        ops.frozen_block(x, *weights, w1, b1[0], w2, b2)
    with pytest.raises(ValueError, match=r"w2 has shape \(32, 8\): expected \(8, 32\)"):
        ops.frozen_block(x, *weights, w1, b1, w2.t(), b2)
    with pytest.raises(TypeError, match=r"w1 is torch.bfloat16"):
        ops.frozen_block(x, *weights, w1.bfloat16(), b1, w2, b2)
    with pytest.raises(TypeError, match=r"w2 is torch.bfloat16"):
        ops.frozen_block(x, *weights, w1, b1, w2.bfloat16(), b2)
    with pytest.raises(TypeError, match=r"b1 has dtype torch.int32"):
        ops.frozen_block(x, *weights, w1, b1.int(), w2, b2)
    with pytest.raises(ValueError, match=r"b2 is on meta"):
        ops.frozen_block(x, *weights, w1, b1, w2, b2.to("meta"))
    for bad in (x[0], x.int(), None, x.numpy()):
        with pytest.raises((TypeError, ValueError), match=r"^x (is|has)"):
            ops.frozen_block(bad, *weights, w1, b1, w2, b2)
    for act in ("tanh", ["gelu"]):
        with pytest.raises(ValueError, match=r"act is .*: expected one of"):
            ops.frozen_block(x, *weights, w1, b1, w2, b2, act=act)
    with pytest.raises(TypeError, match="w2 is a ndarray"):
        ops.frozen_block(x, *weights, w1, b1, w2.numpy(), b2)
    weight, bias = folded_weights(shrink)
    with pytest.raises(ValueError, match=r"expected \(C', C, kh, kw\)"):
        ops.frozen_downsample(x, weight.flatten(1), bias)
    with pytest.raises(ValueError, match=r"the patch bias has shape \(11,\): expected \(12,\)"):
        ops.frozen_downsample(x, weight, bias[1:])


class Detector(torch.nn.Module):
    """A frozen model inside another."""

    def __init__(self):
        super().__init__()
        self.backbone = model_of(torch.float64)

    def forward(self, x):
        return self.backbone(x)


def test_loading_a_state_dict_around_or_inside_unfreezes():
    x = image(torch.float64)
    other = Detector()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    want = other(x)
    around = Detector()
    around.backbone.freeze()
    around.load_state_dict(other.state_dict())
    assert torch.equal(around(x), want)
    assert all(parameter.requires_grad for parameter in around.parameters())
    inside = Detector()
    inside.backbone.freeze()
    for name, module in inside.backbone.named_children():
        module.load_state_dict(getattr(other.backbone, name).state_dict())
    assert torch.equal(inside(x), want)


def test_freezing_twice_remembers_what_was_trainable():
    model = model_of()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.freeze().freeze()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize("made", [ConvNext, ConvNextForImageClassification])
def test_parameters_that_want_gradients_again_get_them(made):
    model, plain = model_of(torch.float64, made), model_of(torch.float64, made)
    model.freeze().requires_grad_(True)
    gradients = []
    for each in (model, plain):
        logits(each, image(torch.float64)).square().sum().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    for got, want in zip(*gradients, strict=True):
        assert relative_error(got, want) <= BOUNDS[torch.float64]


def test_training_mode_of_a_part_unfreezes_it():
    model = model_of().freeze()
    model.stages[1].train()
    assert {name.split(".")[1] for name in folded(model)} == {"0"}
    assert {name.split(".")[1] for name, p in model.stages.named_parameters(prefix="stages") if p.requires_grad} == {
        "1"
    }


def test_weights_folded_in_inference_mode_work_with_autograd():
    model = model_of(torch.float64)
    x = image(torch.float64).requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    with torch.inference_mode():
        model.freeze()
    assert relative_error(torch.autograd.grad(model(x).square().sum(), x)[0], want) <= BOUNDS[torch.float64]


def test_a_change_of_dtype_while_layers_are_called_leaves_no_old_copies():
    model, other = model_of().freeze(), model_of().bfloat16()
    model(image())
    hooks = [block.norm.register_forward_hook(lambda *_: None) for block in model.blocks()]
    model.bfloat16()
    assert all("downsample" in name for name in folded(model))
    for hook in hooks:
        hook.remove()
    assert all(
        value.dtype != torch.float32 or name.endswith(("b1", "b2", "bias")) for name, value in folded(model).items()
    )
    want = copy.deepcopy(other).double()(image(torch.float64))
    got, plain = (each(image(torch.bfloat16)) for each in (model, other))
    assert relative_error(got, want) <= 2 * relative_error(plain, want)
