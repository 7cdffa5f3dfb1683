"""`fuse` on the models of transformers: agreement, what it preserves, and later changes of a block."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from fuse_support import (
    check_bfloat16,
    check_float32,
    everything,
    fused_calls,
    one_thread,  # noqa: F401
    tensors,
    widths,
)
from support import FLOAT32_BOUND, randomise, relative_error
from torch.utils.checkpoint import checkpoint
from transformers import (
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DINOv3ConvNextBackbone,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.convnext.modeling_convnext import ConvNextDropPath

import convnext_fast
from convnext_fast import fuse, unfuse


def config(kind=ConvNextConfig, seed=0, **fields):
    usual = {"depths": [1, 2, 1, 1], "num_labels": 5, "layer_scale_init_value": 1.0, "drop_path_rate": 0.4}
    return kind(**{"hidden_sizes": widths(seed), **usual, **fields})


def upernet():
    backbone = config(seed=7, out_features=["stage1", "stage2", "stage3", "stage4"])
    model = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, num_labels=3, hidden_size=8, pool_scales=[1, 2], use_auxiliary_head=False
        )
    )
    for module in model.modules():
        # After a norm over a batch of pooled maps, the gradients of earlier layers are rounding errors.
        if hasattr(module, "batch_norm"):
            module.batch_norm = torch.nn.Identity()
    return model


MODELS = {
    "classifier": lambda: ConvNextForImageClassification(config(seed=1)),
    "classifier, tanh gelu": lambda: ConvNextForImageClassification(config(seed=2, hidden_act="gelu_new")),
    "classifier, no layer scale": lambda: ConvNextForImageClassification(config(seed=3, layer_scale_init_value=0.0)),
    "classifier, relu": lambda: ConvNextForImageClassification(config(seed=4, hidden_act="relu")),
    "model": lambda: ConvNextModel(config(seed=5, hidden_act="silu")),
    "backbone": lambda: ConvNextBackbone(config(seed=6, out_features=["stage2", "stage4"])),
    "upernet": upernet,
    "dinov3": lambda: DINOv3ConvNextModel(config(DINOv3ConvNextConfig, seed=8)),
    "dinov3 backbone": lambda: DINOv3ConvNextBackbone(config(DINOv3ConvNextConfig, seed=9, out_features=["stage3"])),
    "v2": lambda: ConvNextV2ForImageClassification(config(ConvNextV2Config, seed=10)),
}


def tiny(**fields):
    return randomise(
        ConvNextForImageClassification(config(**{"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, **fields}))
    )


def blocks(model):
    return [m for m in model.modules() if type(m).__name__ in ("ConvNextLayer", "FSDPConvNextLayer")]


@pytest.fixture
def image():
    return torch.randn(3, 3, 32, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_agrees(name):
    torch.manual_seed(0)
    model = randomise(MODELS[name]())
    x = torch.randn(3, 3, 48, 40)
    report = check_float32(copy.deepcopy(model), x)
    assert len(report.fused) == 5
    assert len(report.patch_layers) == 4
    assert not report.left_alone
    check_bfloat16(model, x)


def test_fused_blocks_run_fused(image):
    model = tiny()
    assert fused_calls(model(image)) == 0
    assert fuse(model).fused == ("convnext.encoder.stages.0.layers.0", "convnext.encoder.stages.1.layers.0")
    assert fused_calls(model(image)) == 2
    unfuse(model)
    assert fused_calls(model(image)) == 0


class Recording(ConvNextDropPath):
    """Remembers the dtypes in which it draws."""

    def __init__(self, rate):
        super().__init__(rate)
        self.seen = []

    def forward(self, hidden_states):
        self.seen.append(hidden_states.dtype)
        return super().forward(hidden_states)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_drops_the_same_samples(autocast, gamma):
    """In the dtype of the host's residual branch: that of the layer scale, or autocast's without one."""
    block = blocks(tiny(layer_scale_init_value=gamma))[0].train()
    block.drop_path = Recording(0.6)
    x = torch.randn(16, 8, 6, 5)
    results = []
    for _ in range(2):
        block.drop_path.seen.clear()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(block(x))
        assert block.drop_path.seen == [torch.bfloat16 if autocast and not gamma else torch.float32]
        assert fuse(block, strict=True).fused == ("",)
    assert relative_error(results[1], results[0]) <= 0.01
    torch.manual_seed(4)
    assert relative_error(block(x), results[0]) > 0.1


def test_changes_nothing_else(image):
    model = tiny().train()
    before = {
        "keys": list(model.state_dict()),
        "tensors": [id(p) for p in model.parameters()],
        "kinds": [type(m).__name__ for m in model.modules()],
        "modes": [m.training for m in model.modules()],
    }
    classes = [type(m) for m in model.modules()]
    random_state = torch.get_rng_state()
    first = fuse(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(model.state_dict()) == before["keys"]
    assert [id(p) for p in model.parameters()] == before["tensors"]
    assert [type(m).__name__ for m in model.modules()] == before["kinds"]
    assert [m.training for m in model.modules()] == before["modes"]
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    assert "fused by convnext_fast" in repr(model)
    fused_classes = [type(m) for m in model.modules()]
    assert fuse(model) == first
    assert [type(m) for m in model.modules()] == fused_classes
    unfuse(model)
    unfuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert "fused by" not in repr(model)
    assert not any("convnext_fast" in key for m in model.modules() for key in vars(m))


def copies():
    def saved(model):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle 2": lambda model: pickle.loads(pickle.dumps(model, 2)),
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": saved,
        "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    }


@pytest.mark.parametrize("way", copies())
def test_copies(way, image):
    model = tiny().eval()
    fuse(model)
    twin = copies()[way](model)
    assert fused_calls(twin(image)) == 2
    assert torch.equal(twin(image).logits, model(image).logits)
    with torch.no_grad():
        next(twin.parameters()).mul_(2)
    assert not torch.equal(twin(image).logits, model(image).logits)
    unfuse(twin)
    assert fused_calls(twin(image)) == 0
    assert fused_calls(model(image)) == 2


def test_state_dict_goes_both_ways(image, tmp_path):
    """Also by ``save_pretrained``, with the same file names and keys."""
    model, other = tiny().eval(), randomise(tiny(), seed=5).eval()
    expected = model(image).logits
    fuse(other)
    other.load_state_dict(model.state_dict())
    assert relative_error(other(image).logits, expected) <= FLOAT32_BOUND
    other.save_pretrained(tmp_path)
    loaded = ConvNextForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(image).logits, expected)
    assert fuse(loaded).fused


def test_outputs_are_those_of_the_host(image):
    """Hidden states, tuples, losses, feature maps: as before, name by name."""
    for model, options in [
        (tiny(), {"output_hidden_states": True, "labels": torch.tensor([0, 1, 2])}),
        (tiny(), {"return_dict": False}),
        (randomise(ConvNextBackbone(config(out_features=["stem", "stage4"]))), {"output_hidden_states": True}),
        (randomise(DINOv3ConvNextModel(config(DINOv3ConvNextConfig))), {"output_hidden_states": True}),
    ]:
        model.eval()
        expected = model(image, **options)
        fuse(model)
        actual = model(image, **options)
        assert type(actual) is type(expected)
        if isinstance(expected, dict):
            assert list(actual) == list(expected)
        for mine, theirs in zip(tensors(actual), tensors(expected), strict=True):
            assert mine.shape == theirs.shape
            assert relative_error(mine, theirs) <= FLOAT32_BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_dtype_after_fusing(dtype, image):
    model = tiny().eval()
    exact = copy.deepcopy(model).double()(image.double()).logits
    plain = copy.deepcopy(model).to(dtype)(image.to(dtype)).logits
    fuse(model)
    fused = model.to(dtype)(image.to(dtype)).logits
    assert fused.dtype == dtype
    assert relative_error(fused, exact) <= 2 * max(relative_error(plain, exact), 1e-14)


def test_frozen_and_tied_weights(image):
    model = tiny(hidden_sizes=[8, 8], depths=[1, 1])
    first, second = blocks(model)
    second.pwconv1.weight = first.pwconv1.weight
    first.dwconv.requires_grad_(False)
    expected = {}
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        model(image).logits.square().sum().backward()
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        for name, grad in expected.items():
            assert (grads[name] is None) == (grad is None), name
            assert grad is None or relative_error(grads[name], grad) <= FLOAT32_BOUND, name
        expected = grads
        fuse(model)
    assert second.pwconv1.weight is first.pwconv1.weight
    assert expected["convnext.encoder.stages.0.layers.0.dwconv.weight"] is None


def test_meta_model_is_fused_before_it_has_weights(image):
    with torch.device("meta"):
        model = tiny().eval()
    assert fuse(model).fused
    weights = tiny()
    model.to_empty(device="cpu").load_state_dict(weights.state_dict())
    assert relative_error(model(image).logits, weights.eval()(image).logits) <= FLOAT32_BOUND


def test_hooks_on_blocks_fire(image):
    model = tiny()
    seen = []
    fuse(model)
    block = blocks(model)[0]
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    block.register_forward_hook(lambda *_: seen.append("after"))
    block.register_full_backward_hook(lambda *_: seen.append("backward"))
    outputs = model(image)
    outputs.logits.sum().backward()
    assert seen == ["before", "after", "backward"]
    assert fused_calls(outputs) == 2


def replace_activation(block):
    block.act = torch.nn.Hardswish()


def replace_forward(block):
    original = block.pwconv1.forward
    block.pwconv1.forward = lambda x: original(x) + 1


CHANGES = {
    "hooks on pwconv1": lambda block: block.pwconv1.register_forward_hook(lambda *_: None),
    r"act is now \S*Hardswish": replace_activation,
    r"dwconv is now \S*Identity": lambda block: setattr(block, "dwconv", torch.nn.Identity()),
    "its layer_scale_parameter is gone": lambda block: setattr(block, "layer_scale_parameter", None),
    "it has a tensor bias now": lambda block: setattr(block, "bias", torch.nn.Parameter(torch.zeros(8))),
    r"drop_path is now \S*Dropout": lambda block: setattr(block, "drop_path", torch.nn.Dropout(0.5).eval()),
    r"dwconv is now \S*ParametrizedConv2d": lambda block: torch.nn.utils.parametrizations.weight_norm(block.dwconv),
    "padding of dwconv is now": lambda block: vars(block.dwconv).update(dilation=(2, 2), padding=(6, 6)),
    "the forward of pwconv1 was replaced": replace_forward,
    r"the weight of pwconv2 is now \S*Odd": lambda block: setattr(
        block.pwconv2, "weight", torch.nn.Parameter(block.pwconv2.weight.detach().as_subclass(Odd))
    ),
}


class Odd(torch.Tensor):
    """Another library's kind of tensor."""


@pytest.mark.parametrize("reason", CHANGES)
def test_change_after_fusing_runs_the_hosts_forward(reason, image):
    model = tiny().eval()
    fuse(model)
    CHANGES[reason](blocks(model)[0])
    with pytest.warns(RuntimeWarning, match=reason):
        outputs = model(image)
    assert fused_calls(outputs) == 1
    report = fuse(model)
    assert re.search(reason, report.left_alone["convnext.encoder.stages.0.layers.0"])
    assert report.fused == ("convnext.encoder.stages.1.layers.0",)
    unfuse(model)
    assert relative_error(model(image).logits, outputs.logits) <= FLOAT32_BOUND


def test_hooks_removed_again(image):
    model = tiny().eval()
    fuse(model)
    handle = blocks(model)[0].dwconv.register_forward_hook(lambda *_: None)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_calls(model(image)) == 2


def test_report_reads_well():
    model = tiny(depths=[1, 2])
    blocks(model)[0].act = torch.nn.Hardswish()
    report = fuse(model)
    assert str(report) == (
        "ConvNextForImageClassification: 4 of 5 fused: 2 blocks, 2 patch layers (stem, downsampling)\n"
        "left alone: convnext.encoder.stages.0.layers.0: "
        "its activation act (Hardswish) is none of gelu, gelu_new, relu, silu, selu"
    )
    assert report.model is model
    v2 = ConvNextV2ForImageClassification(config(ConvNextV2Config, depths=[1, 1, 1, 1]))
    assert "8 of 8 fused: 4 blocks, 4 patch layers" in str(fuse(v2))
    assert str(fuse(torch.nn.Linear(2, 2))) == "Linear: no ConvNeXt block found"


def test_strict():
    model = tiny()
    blocks(model)[1].act = torch.nn.Hardswish()
    with pytest.raises(ValueError, match=r"changed nothing(.|\n)*Hardswish"):
        fuse(model, strict=True)
    assert "fused by" not in repr(model)
    with pytest.raises(ValueError, match="no ConvNeXt block found"):
        fuse(torch.nn.Linear(2, 2), strict=True)
    assert fuse(tiny(), strict=True).fused
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"model is a dict: expected a torch.nn.Module"):
            function({})


def test_own_models():
    model = convnext_fast.ConvNextModel(
        convnext_fast.ConvNextConfig(hidden_sizes=[8], depths=[2], num_stages=1), fused=True
    )
    assert len(fuse(model).fused) == 2
    model.fused = False
    assert set(fuse(model).left_alone.values()) == {"it is this package's own, with fused=False"}


def test_checkpointing(image):
    """Recomputed in the backward pass, with the same samples dropped."""
    model = tiny(drop_path_rate=0.5).train()
    expected = everything(model, image)
    fuse(model)
    for block in blocks(model):
        original = block.forward
        block.forward = lambda x, original=original: checkpoint(original, x, use_reentrant=False)
    for name, value in everything(model, image).items():
        assert relative_error(value, expected[name]) <= FLOAT32_BOUND, name
