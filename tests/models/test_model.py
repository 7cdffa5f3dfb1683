"""`ConvNext`: timm's contract, fused against plain, any size, any memory format."""

from __future__ import annotations

import pytest
import torch
import torch.fx
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BOUNDS, gradients, randomise, relative_error
from torch.utils.checkpoint import checkpoint

from convnext_fast import ConvNext, ConvNextConfig
from convnext_fast.backends.cpu import llvm


def small(fused=True, **fields):
    options = {k: fields.pop(k) for k in ("dtype", "head_norm_first", "global_pool", "num_classes") if k in fields}
    fields = {"hidden_sizes": [8, 13, 21, 34], "depths": [1, 2, 1, 1], "num_labels": 5, **fields}
    return randomise(ConvNext(ConvNextConfig(**fields), fused=fused, **options))


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=st.integers(32, 75),
    width=st.integers(32, 75),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    recompute=st.sampled_from([0, 1, 2]),
    head_norm_first=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fused_agrees_with_plain(batch, height, width, layout, dtype, recompute, head_norm_first, seed):
    model = small(dtype=dtype, head_norm_first=head_norm_first, drop_path_rate=0.4).train()
    model.recompute = recompute
    torch.manual_seed(seed)
    x = torch.randn(batch, 3, height, 2 * width, dtype=dtype)
    x = x[..., ::2] if layout == "strided" else x[..., :width].contiguous()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for fused in (False, True):
        model.fused = fused
        leaf = x.detach().requires_grad_()
        torch.manual_seed(seed)
        y = model(leaf)
        results.append({"logits": y, **gradients(model, [y], [leaf])})
    for name, expected in results[0].items():
        assert relative_error(results[1][name], expected) <= BOUNDS[dtype], name


def test_paths_are_chosen_and_reported():
    model = small()
    x = torch.randn(1, 3, 32, 32)
    assert model.backend_for(x) == "aten"  # 17 channels, which no x86 kernel serves
    assert model.backend_for(x.double()) == "aten"
    served = ConvNext(ConvNextConfig(num_stages=1, hidden_sizes=[16], depths=[1]))
    assert served.backend_for(x) == ("cpu" if llvm.machine_for(16) else "aten")
    assert served.backend_for(x.double()) == "aten"
    model.fused = 0
    assert model.fused is False
    assert model.backend_for(x) == "reference"
    with pytest.raises(TypeError, match="x is a list"):
        model.backend_for([1])


def test_forward_is_features_then_head():
    model = small().eval()
    x = torch.randn(2, 3, 64, 40)
    features = model.forward_features(x)
    assert features.shape == (2, 34, 2, 1)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.get_classifier()(pooled), model(x))


def test_intermediates():
    model = small(head_norm_first=True).eval()
    x = torch.randn(2, 3, 64, 64)
    last, maps = model.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [8, 13, 21, 34]
    assert [64 // m.shape[2] for m in maps] == model.feature_info.reduction() == [4, 8, 16, 32]
    assert torch.equal(last, model.forward_features(x))
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(normed[0], last)
    early, (_, third) = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
    assert torch.equal(early, third)
    first, (only,) = model.forward_intermediates(x, indices=[0], stop_early=True, output_fmt="NHWC")
    assert torch.equal(only.permute(0, 3, 1, 2), first)
    assert torch.equal(first, maps[0])
    for options, message in [
        ({"indices": [4]}, "stage indices"),
        ({"indices": 9}, "1 to 4"),
        ({"output_fmt": "HW"}, "NHWC"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(x, **options)


def test_features_only():
    config = ConvNextConfig(hidden_sizes=[8, 13, 21, 34], depths=[1, 2, 1, 1])
    whole = randomise(ConvNext(config)).eval()
    model = ConvNext(config, features_only=True, out_indices=(1, -1)).eval()
    wanted = {k: v for k, v in whole.state_dict().items() if not k.startswith("head")}
    model.load_state_dict(wanted)
    x = torch.randn(1, 3, 32, 64)
    maps = model(x)
    expected = whole.forward_intermediates(x, [1, 3], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert model.feature_info.channels() == [13, 34]
    assert model.feature_info.module_name(0) == "stages.1"
    with pytest.raises(ValueError, match="features_only=True"):
        model.get_classifier()
    with pytest.raises(ValueError, match="out_indices chooses"):
        ConvNext(config, out_indices=[1])


def test_reset_classifier_and_pooling():
    model = small(dtype=torch.float64)
    x = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.config.num_labels == model.num_classes == 7
    assert model.get_classifier().weight.dtype == torch.float64
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(0, global_pool="")
    assert model(x).shape == (2, 34, 1, 2)
    model.reset_classifier(3, global_pool="max")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="expected num_classes=0, not 3"):
        model.reset_classifier(3, global_pool="")
    with pytest.raises(ValueError, match="global_pool is 'sum'"):
        model.reset_classifier(3, global_pool="sum")


def test_conv_mlp_state_dict_loads_strictly():
    model = small()
    state = {
        k: v[:, :, None, None] if k.endswith(("fc1.weight", "fc2.weight")) else v for k, v in model.state_dict().items()
    }
    other = ConvNext(model.config)
    other.load_state_dict(state)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_checkpointing_around_the_whole_model_keeps_gradients():
    model = small(dtype=torch.float64).train()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    expected = gradients(model, [model(x)], [x])
    torch.manual_seed(0)
    found = gradients(model, [checkpoint(model, x, use_reentrant=False)], [x])
    assert all(relative_error(found[k], v) <= BOUNDS[torch.float64] for k, v in expected.items())


def test_grad_checkpointing_keeps_gradients():
    model = small(dtype=torch.float64, drop_path_rate=0.5).train()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        results.append(gradients(model, [model(x)], []))
    assert all(relative_error(results[1][k], v) <= BOUNDS[torch.float64] for k, v in results[0].items())


def test_layer_decay_helpers():
    model = small()
    skipped = model.no_weight_decay()
    assert "stages.0.blocks.0.gamma" in skipped
    assert "head.norm.weight" in skipped
    assert "stem.0.weight" not in skipped
    assert set(model.group_matcher()) == {"stem", "blocks"}
    assert isinstance(model.group_matcher(coarse=True)["blocks"], str)


def test_freeze_folds_and_training_unfreezes():
    model = small(dtype=torch.float64)
    model.stem.requires_grad_(False)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    expected = model.eval()(x).detach()
    keys = list(model.state_dict())
    assert model.freeze() is model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == keys
    assert relative_error(model(x), expected) <= BOUNDS[torch.float64]
    with torch.no_grad():
        for block in model.blocks():
            block.norm.weight.zero_()
    changed = model(x)
    assert relative_error(changed, expected) > 1e-3
    model.train()
    assert all(p.requires_grad == (not name.startswith("stem")) for name, p in model.named_parameters())
    assert relative_error(model.eval()(x), changed) <= BOUNDS[torch.float64]
    model.freeze()
    model.load_state_dict(randomise(ConvNext(model.config, dtype=torch.float64)).state_dict())
    assert relative_error(model(x), expected) <= BOUNDS[torch.float64]
    half = model.freeze().to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    model.fused = False
    with pytest.raises(ValueError, match="expected a model with fused=True"):
        model.freeze()


def test_drop_path_one_drops_everything():
    model = small(dtype=torch.float64, drop_path_rate=1.0).train()
    block = model.blocks()[-1]
    x = torch.randn(2, 34, 3, 3, dtype=torch.float64)
    assert torch.equal(block(x), x)


def test_switches_reject_bad_values():
    model = small()
    with pytest.raises(ValueError, match="recompute is 5"):
        model.recompute = 5
    model.recompute = 0
    assert model.recompute == 0
    for arguments, error, message in [
        ({"variant_or_config": "huge"}, ValueError, "variant is 'huge'"),
        ({"variant_or_config": 3}, TypeError, "not a int"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate is 1.0"),
        ({"in_chans": 0}, ValueError, "num_channels is 0"),
        ({"global_pool": "", "num_classes": 3}, ValueError, "num_classes=0"),
    ]:
        with pytest.raises(error, match=message):
            ConvNext(**{"variant_or_config": "atto", "device": "meta", **arguments})
    with pytest.raises(ValueError, match="31×32 pixels: expected at least 32×32"):
        model(torch.randn(1, 3, 31, 32))


def test_construction_options():
    model = ConvNext("atto", num_classes=0, in_chans=5, drop_path_rate=0.2, device="meta", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.stem[0].in_channels == 5
    assert model.blocks()[-1].drop_path.rate == pytest.approx(0.2)
    assert "fused=True" in repr(model)


def test_features_only_has_only_the_stages_that_it_runs(tmp_path):
    sizes = {"num_stages": 4, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}
    config = ConvNextConfig(**sizes, num_labels=5, drop_path_rate=0.3)
    whole = randomise(ConvNext(config, dtype=torch.float64)).eval()
    whole.save_pretrained(tmp_path)
    model = ConvNext.from_pretrained(tmp_path, features_only=True, out_indices=(1, 0))
    assert len(model.stages) == 2
    assert model.out_indices == [0, 1]
    assert model.feature_info.channels() == [8, 12]
    assert [b.drop_path.rate for b in model.blocks()] == [b.drop_path.rate for b in whole.blocks()[:2]]
    x = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    want = whole.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(torch.equal(got, expected) for got, expected in zip(model(x), want, strict=True))
    assert model(torch.randn(1, 3, 8, 8, dtype=torch.float64))[1].shape == (1, 12, 1, 1)
    model.save_pretrained(tmp_path / "cut")
    again = ConvNext.from_pretrained(tmp_path / "cut", features_only=True)
    assert all(torch.equal(got, expected) for got, expected in zip(again(x), want, strict=True))
    assert [b.drop_path.rate for b in again.blocks()] == pytest.approx([b.drop_path.rate for b in model.blocks()])
    model.train()
    sum(map(torch.sum, model(x))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="expected each stage once"):
        ConvNext(config, features_only=True, out_indices=(1, 1))
    with pytest.raises(ValueError, match="expected stage indices from 0 to 1"):
        model.forward_intermediates(x, [2])


@pytest.mark.parametrize("kind", ["fused", "plain", "frozen"])
def test_symbolic_tracing(kind):
    """As `torchvision.models.feature_extraction` and graph-based quantisation do it.

    The trace holds the layers, not the fused ops.
    """
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[1, 2], num_labels=5, drop_path_rate=0.5)
    model = randomise(ConvNext(config, fused=kind != "plain")).train(kind != "frozen")
    if kind == "frozen":
        model.freeze()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(4, 3, 16, 24)
    results = []
    for each in (traced, model):
        torch.manual_seed(0)
        results.append(each(x))
    assert relative_error(*results) <= (0 if kind == "plain" else BOUNDS[torch.float32])
