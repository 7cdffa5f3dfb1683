"""The four ways to name ConvNeXt's tensors: each key, every conversion, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import randomise

from convnext_fast import VARIANTS, ConvNext, ConvNextConfig
from convnext_fast.checkpoints.formats import FORMATS, from_timm, infer_config, recognise, rename, to_timm

# One tensor of every kind, written out by hand from the libraries' state dicts.
KEYS = [
    ("stem.0.weight", "features.0.0.weight", "embeddings.patch_embeddings.weight", "downsample_layers.0.0.weight"),
    ("stem.1.bias", "features.0.1.bias", "embeddings.layernorm.bias", "downsample_layers.0.1.bias"),
    (
        "stages.1.downsample.0.weight",
        "features.2.0.weight",
        "encoder.stages.1.downsampling_layer.0.weight",
        "downsample_layers.1.0.weight",
    ),
    (
        "stages.3.downsample.1.bias",
        "features.6.1.bias",
        "encoder.stages.3.downsampling_layer.1.bias",
        "downsample_layers.3.1.bias",
    ),
    (
        "stages.0.blocks.2.conv_dw.weight",
        "features.1.2.block.0.weight",
        "encoder.stages.0.layers.2.dwconv.weight",
        "stages.0.2.dwconv.weight",
    ),
    (
        "stages.2.blocks.11.norm.weight",
        "features.5.11.block.2.weight",
        "encoder.stages.2.layers.11.layernorm.weight",
        "stages.2.11.norm.weight",
    ),
    (
        "stages.2.blocks.0.mlp.fc1.weight",
        "features.5.0.block.3.weight",
        "encoder.stages.2.layers.0.pwconv1.weight",
        "stages.2.0.pwconv1.weight",
    ),
    (
        "stages.3.blocks.1.mlp.fc2.bias",
        "features.7.1.block.5.bias",
        "encoder.stages.3.layers.1.pwconv2.bias",
        "stages.3.1.pwconv2.bias",
    ),
    (
        "stages.1.blocks.1.gamma",
        "features.3.1.layer_scale",
        "encoder.stages.1.layers.1.layer_scale_parameter",
        "stages.1.1.gamma",
    ),
    ("head.norm.weight", "classifier.0.weight", "layernorm.weight", "norm.weight"),
    ("head.fc.bias", "classifier.2.bias", "classifier.bias", "head.bias"),
]


@pytest.mark.parametrize("keys", KEYS, ids=lambda keys: keys[0])
def test_every_key_in_every_format(keys):
    timm = keys[FORMATS.index("timm")]
    for key, format in zip(keys, FORMATS, strict=True):
        assert rename(timm, "timm", format) == key
        assert rename(key, format, "timm") == timm
    assert rename("convnext." + keys[2], "transformers", "timm") == timm


@pytest.mark.parametrize(
    ("key", "format"),
    [
        ("stages.0.downsample.0.weight", "timm"),
        ("stages.01.blocks.0.norm.weight", "timm"),
        ("stages.0.blocks.0.gamma.weight", "timm"),
        ("stages.0.blocks.0.conv_dw.scale", "timm"),
        ("features.1.0.weight", "torchvision"),
        ("features.2.0.block.0.weight", "torchvision"),
        ("features.0.2.weight", "torchvision"),
        ("norm_pre.weight", "official"),
        ("hidden_states_norms.stage1.weight", "transformers"),
    ],
)
def test_keys_that_mean_nothing(key, format):
    assert rename(key, format, "timm") is None


@st.composite
def configs(draw):
    stages = draw(st.integers(1, 5))
    sizes = st.integers(1, 11)
    return ConvNextConfig(
        num_channels=draw(st.integers(1, 5)),
        patch_size=draw(st.integers(1, 5) | st.tuples(st.integers(1, 3), st.integers(4, 6))),
        num_stages=stages,
        hidden_sizes=draw(st.lists(sizes, min_size=stages, max_size=stages)),
        depths=draw(st.lists(st.integers(0, 3), min_size=stages, max_size=stages).filter(any)),
        layer_scale_init_value=draw(st.sampled_from([1e-6, 0.0])),
        layer_norm_eps=1e-6,
        num_labels=draw(st.integers(0, 7)),
    )


def same(a, b):
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


@settings(max_examples=25, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_every_pair_of_formats_round_trips_exactly(config, seed):
    state = dict(randomise(ConvNext(config), seed).state_dict())
    written = {format: from_timm(state, format) for format in FORMATS}
    for first, second in itertools.product(FORMATS, FORMATS):
        assert recognise(written[first]) == first
        named, others = to_timm(written[first], first)
        assert not others
        assert same(named, state)
        assert same(from_timm(named, second), written[second])
    assert infer_config(to_timm(written["torchvision"], "torchvision")[0], "torchvision") == config


def tiny_state(**fields):
    fields = {"hidden_sizes": (4, 6, 8, 10), "depths": (1, 1, 2, 1), "num_labels": 3, **fields}
    return dict(randomise(ConvNext(ConvNextConfig(**fields))).state_dict())


def test_torchvision_layer_scale_is_a_feature_map():
    state = from_timm(tiny_state(), "torchvision")
    assert state["features.3.0.layer_scale"].shape == (6, 1, 1)
    assert state["features.3.0.block.3.weight"].shape == (24, 6)


def test_linear_layers_that_are_convolutions():
    state = tiny_state()
    four = {k: v[:, :, None, None] if ".mlp." in k and v.dim() == 2 else v for k, v in state.items()}
    assert four["stages.1.blocks.0.mlp.fc2.weight"].shape == (6, 24, 1, 1)
    assert same(to_timm(four, "timm")[0], state)


def test_features_only_names():
    state = {k: v for k, v in tiny_state().items() if not k.startswith("head")}
    flat = {k.replace("stages.", "stages_").replace("stem.", "stem_"): v for k, v in state.items()}
    assert "stages_2.blocks.1.gamma" in flat
    assert "stem_1.weight" in flat
    assert recognise(flat) == "timm"
    assert same(to_timm(flat, "timm")[0], state)


def test_prefix_follows_the_classifier():
    state = tiny_state()
    assert {k.split(".")[0] for k in from_timm(state, "transformers")} == {"convnext", "classifier"}
    bare = {k: v for k, v in state.items() if not k.startswith("head.fc")}
    written = from_timm(bare, "transformers")
    assert {k.split(".")[0] for k in written} == {"embeddings", "encoder", "layernorm"}
    assert recognise(written) == "transformers"


def test_backbone_norms_are_extra():
    norms = {"hidden_states_norms.stage4.weight": torch.ones(10)}
    bare = {k: v for k, v in tiny_state().items() if not k.startswith("head")}
    written = from_timm(bare, "transformers", extra=norms)
    assert recognise(written) == "transformers"
    named, others = to_timm(written, "transformers")
    assert same(others, norms)
    assert same(named, bare)
    for format in ("timm", "torchvision", "official"):
        with pytest.raises(ValueError, match=r"hidden_states_norms\.stage4\.weight"):
            from_timm(bare, format, extra=norms)


@pytest.mark.parametrize("format", ["torchvision", "transformers", "official"])
def test_norm_before_pooling_exists_only_in_timm(format):
    state = dict(ConvNext(ConvNextConfig(hidden_sizes=(4, 4, 4, 4)), head_norm_first=True).state_dict())
    assert recognise(state) == "timm"
    assert same(from_timm(state, "timm"), state)
    with pytest.raises(ValueError, match=r"norm_pre\.weight.*before the pooling"):
        from_timm(state, format)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ([], "no tensors"),
        (["stages.0.layers.0.depthwise_conv.weight", "layer_norm.weight"], "DINOv3"),
        (["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "norm.weight", "norms.3.weight"], "DINOv3"),
        (["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "fc.weight"], r"conv1\.weight, bn1\.weight"),
        (["features.0.0.weight", "features.1.0.block.0.0.weight", "features.1.0.block.1.fc1.weight"], "not the keys"),
        (["embeddings.cls_token", "encoder.layer.0.attention.query.weight", "layernorm.weight"], "not the keys"),
        (["stem.0.weight", "stages.0.blocks.0.norm.weight", "stages.0.blocks.0.mlp.fc1.weight"], "not the keys"),
    ],
)
def test_other_architectures_are_named(keys, named):
    with pytest.raises(ValueError, match=named):
        recognise(keys)


def test_two_keys_for_one_tensor():
    state = tiny_state()
    state["stem_0.weight"] = state["stem.0.weight"]
    with pytest.raises(ValueError, match=r"stem\.0\.weight twice"):
        to_timm(state, "timm")


@pytest.mark.parametrize("function", [to_timm, from_timm])
def test_unknown_format(function):
    with pytest.raises(ValueError, match=r"'keras'.*timm, torchvision, transformers, official"):
        function(tiny_state(), "keras")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem.0.weight": None}, "stem.0.weight is missing"),
        ({"stem.0.weight": torch.ones(4)}, r"stem.0.weight is of shape \(4,\)"),
        ({"stages.5000.blocks.0.norm.weight": torch.ones(4)}, "too many"),
        ({"stages.0.blocks.5000.norm.weight": torch.ones(4)}, "too many"),
        ({"stages.5.blocks.0.conv_dw.weight": torch.ones(4)}, "no downsampling convolution for stage 4"),
        ({"stages.3.downsample.1.weight": torch.ones(())}, "hidden_sizes"),
    ],
)
def test_shapes_that_are_not_a_convnext(change, message):
    state = {k: v for k, v in (tiny_state() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        infer_config(state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inferred_variants_and_their_epsilons(variant):
    state = ConvNext(variant, device="meta").state_dict()
    assert infer_config(state) == ConvNextConfig.from_variant(variant, num_labels=1000)
    assert infer_config(state, "transformers").layer_norm_eps == 1e-12
    assert infer_config(state, "transformers").norm_eps == 1e-6
    assert infer_config(state, "official").norm_eps == 1e-6
