"""ConvNeXt V2: transformers' classes against transformers itself, and `ConvNext` in every way it runs."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support import BOUNDS, FLOAT32_BOUND, gradients, randomise, relative_error
from torch.utils.flop_counter import FlopCounterMode

import convnext_fast
from convnext_fast import ConvNext, ConvNextConfig, ConvNextV2Config

SIZES = {"hidden_sizes": [8, 11, 16], "depths": [1, 2, 1], "num_stages": 3, "num_labels": 4}


def pair(name, dtype, fused, **fields):
    """transformers' model and ours with the same random weights."""
    theirs = randomise(getattr(transformers, name)(transformers.ConvNextV2Config(**SIZES, **fields))).to(dtype)
    ours = getattr(convnext_fast, name)(ConvNextV2Config(**SIZES, **fields), fused=fused, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return theirs, ours


def tiny(**options):
    return randomise(ConvNext(ConvNextV2Config(**SIZES), **options))


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, True), (torch.float64, False)])
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_classifier(dtype, fused, recompute):
    """Outputs, losses and every gradient, with stochastic depth."""
    models = pair("ConvNextV2ForImageClassification", dtype, fused, drop_path_rate=0.3)
    models[1].recompute = recompute
    x, labels = torch.randn(3, 3, 45, 70, dtype=dtype), torch.tensor([0, 3, 1])
    results = []
    for model in models:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(7)
        out = model.train()(pixel_values=leaf, labels=labels, output_hidden_states=True)
        outputs = [out.loss, out.logits, *out.hidden_states]
        results.append([*outputs, *gradients(model, outputs, [leaf]).values()])
    assert max(map(relative_error, *reversed(results))) <= BOUNDS[dtype]


@pytest.mark.parametrize("name", ["ConvNextV2Model", "ConvNextV2Backbone"])
def test_model_and_backbone(name):
    models = pair(name, torch.float32, True)
    x, results = torch.randn(2, 3, 33, 40), []
    for model in models:
        out = model.eval()(x)
        results.append(out.feature_maps if "Backbone" in name else [out.last_hidden_state, out.pooler_output])
    assert max(map(relative_error, *reversed(results))) <= FLOAT32_BOUND


def test_defaults_are_those_of_transformers():
    ours, theirs = ConvNextV2Config(), transformers.ConvNextV2Config()
    for name in ConvNextConfig().to_dict().keys() - {"layer_scale_init_value", "norm_eps", "dtype"}:
        if hasattr(theirs, name):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert "layer_scale_init_value" not in ours.to_dict()


def test_folders_are_those_of_transformers(tmp_path):
    theirs, ours = pair("ConvNextV2ForImageClassification", torch.float32, True)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval()(x).logits
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
        read = type(ours).from_pretrained(tmp_path / "theirs")
        assert relative_error(read(x).logits, expected) <= FLOAT32_BOUND
        again = type(theirs).from_pretrained(tmp_path / "ours")
        assert relative_error(again(x).logits, expected) <= FLOAT32_BOUND
        assert again.config.architectures == ["ConvNextV2ForImageClassification"]
        plain = ConvNext.from_pretrained(tmp_path / "theirs")
        assert relative_error(plain(x), expected) <= FLOAT32_BOUND
    assert isinstance(ConvNextConfig.from_pretrained(tmp_path / "theirs"), ConvNextV2Config)


def test_other_versions_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"ConvNextConfig: expected a convnext_fast\.ConvNextV2Config"):
        convnext_fast.ConvNextV2Model(ConvNextConfig())
    with pytest.raises(TypeError, match=r"ConvNextV2Config: expected a convnext_fast\.ConvNextConfig"):
        convnext_fast.ConvNextModel(ConvNextV2Config())
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a ConvNeXt V2: expected V1 for ConvNextForImageClassification"):
        convnext_fast.ConvNextForImageClassification.from_pretrained(tmp_path)
    ConvNextConfig().save_pretrained(tmp_path / "v1")
    with pytest.raises(ValueError, match="type 'convnext': expected 'convnextv2'"):
        ConvNextV2Config.from_pretrained(tmp_path / "v1")
    with pytest.raises(ValueError, match="variant is 'tiny', of ConvNeXt V1"):
        ConvNextV2Config.from_variant("tiny")


@pytest.mark.parametrize("dtype", BOUNDS)
def test_fused_and_plain(dtype):
    model = tiny(dtype=dtype)
    x = torch.randn(2, 3, 40, 33, dtype=dtype)
    assert (model.config.version, model.backend_for(x)) == (2, "aten")
    results = []
    for fused in (True, False):
        model.fused = fused
        y = model(x)
        results.append([y, *gradients(model, [y], []).values()])
    assert max(map(relative_error, *results)) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_frozen(dtype):
    """Also after the response norm's weights changed, and unfrozen again."""
    model = tiny(dtype=dtype).eval()
    plain = copy.deepcopy(model)
    plain.fused = False
    x = torch.randn(2, 3, 40, 33, dtype=dtype)
    model.freeze()
    assert not any(p.requires_grad for p in model.parameters())
    for name in ("weight", "bias"):
        with torch.no_grad():
            assert relative_error(model(x), plain(x)) <= BOUNDS[dtype]
            for each in (model, plain):
                getattr(each.stages[1].blocks[1].mlp.grn, name).mul_(2)
            assert relative_error(model(x), plain(x)) <= BOUNDS[dtype], name
    model.unfreeze()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_and_exported(frozen):
    model, x = tiny().eval(), torch.randn(2, 3, 32, 32)
    if frozen:
        model.freeze()
    with torch.no_grad():
        expected = model(x)
        assert relative_error(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected) <= FLOAT32_BOUND
        assert relative_error(torch.export.export(model, (x,)).module()(x), expected) <= FLOAT32_BOUND
    if not frozen:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        grads = [torch.autograd.grad(each(x).square().sum(), list(model.parameters())) for each in (compiled, model)]
        assert max(map(relative_error, *grads)) <= FLOAT32_BOUND


def test_flops_are_those_of_v1():
    """A counter counts products, of which the response norm has none."""
    counts = []
    for config in (ConvNextConfig(**SIZES), ConvNextV2Config(**SIZES)):
        model = ConvNext(config)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 32, 32)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_replaced_response_norm_is_called():
    model, x = tiny().eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model.stages[0].blocks[0].mlp.grn = torch.nn.Identity()
        with pytest.warns(RuntimeWarning, match=r"mlp\.grn is now .*Identity"):
            y = model(x)
        model.fused = False
        assert torch.equal(y, model(x)) or relative_error(y, model(x)) <= FLOAT32_BOUND


def test_float16_where_the_sum_of_squares_overflows():
    """Hidden units near 100 on 16×16 pixels: Σh² is 40 times the largest float16."""
    torch.manual_seed(0)
    model = tiny().eval()
    with torch.no_grad():
        model.stages[0].blocks[0].mlp.fc1.bias.add_(100)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = model.double()(x.double())
        assert relative_error(model.half()(x.half()), exact) <= 0.05
