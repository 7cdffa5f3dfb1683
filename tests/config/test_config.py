"""`ConvNextConfig`: defaults, round trips with transformers, and named errors."""

from __future__ import annotations

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_fast import VARIANTS, ConvNext, ConvNextConfig


@st.composite
def fields(draw):
    stages = draw(st.integers(1, 5))
    sizes = st.lists(st.integers(1, 64), min_size=stages, max_size=stages)
    labels = draw(st.integers(1, 6))
    named = {i: f"class {i}" for i in range(labels)}
    return {
        "num_channels": draw(st.integers(1, 5)),
        "patch_size": draw(st.integers(1, 8)),
        "num_stages": stages,
        "hidden_sizes": draw(sizes),
        "depths": draw(sizes),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "silu", "selu", "gelu_new", "swish"])),
        "initializer_range": draw(st.floats(0, 1)),
        "layer_norm_eps": draw(st.floats(1e-12, 1e-3)),
        "layer_scale_init_value": draw(st.sampled_from([1e-6, 1.0, 0.5])),
        "drop_path_rate": draw(st.floats(0, 1)),
        "image_size": draw(st.integers(8, 512)),
        "out_features": draw(st.sampled_from([None, ["stem"], ["stem", f"stage{stages}"]])),
        "id2label": named,
        "label2id": {name: i for i, name in named.items()},
        "problem_type": draw(st.sampled_from([None, "regression", "multi_label_classification"])),
    }


@settings(max_examples=25, deadline=None)
@given(fields=fields())
def test_config_json_goes_to_transformers_and_back(fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    ours = ConvNextConfig(**fields)
    ours.save_pretrained(folder)
    assert ConvNextConfig.from_pretrained(folder) == ours
    theirs = transformers.ConvNextConfig.from_pretrained(folder)
    for name in (*fields, "out_indices", "stage_names", "num_labels"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (list(mine) if isinstance(mine, tuple) else mine) == (list(other) if isinstance(other, tuple) else other)
    theirs.save_pretrained(folder)
    again = ConvNextConfig.from_pretrained(folder)
    for name in (*fields, "out_indices", "num_labels"):
        assert getattr(again, name) == getattr(ours, name)


def test_defaults_are_those_of_transformers():
    ours, theirs = ConvNextConfig(), transformers.ConvNextConfig()
    for name in [
        "num_channels",
        "patch_size",
        "num_stages",
        "hidden_sizes",
        "depths",
        "hidden_act",
        "initializer_range",
        "layer_norm_eps",
        "layer_scale_init_value",
        "drop_path_rate",
        "image_size",
        "out_features",
        "out_indices",
        "num_labels",
        "id2label",
        "label2id",
        "problem_type",
        "stage_names",
    ]:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_unknown_keys_survive(tmp_path):
    config = {**transformers.ConvNextConfig().to_dict(), "my_key": {"a": [1, 2]}, "output_hidden_states": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = ConvNextConfig.from_pretrained(tmp_path)
    assert read.my_key == {"a": [1, 2]}
    read.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["my_key"] == {"a": [1, 2]}


def test_overrides_at_loading(tmp_path):
    ConvNextConfig(num_labels=7, out_features=["stage1"]).save_pretrained(tmp_path)
    read = ConvNextConfig.from_pretrained(tmp_path, num_labels=3, out_indices=[2, 4])
    assert (read.num_labels, read.id2label[2], read.out_features) == (3, "LABEL_2", ["stage2", "stage4"])


def test_folders_of_every_format_hold_the_configuration(tmp_path):
    config = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=3)
    model = ConvNext(config)
    for format in ("timm", "torchvision", "transformers", "official"):
        model.save_pretrained(tmp_path / format, format=format)
        read = ConvNextConfig.from_pretrained(tmp_path / format)
        assert (read.hidden_sizes, read.id2label) == (config.hidden_sizes, config.id2label)


def test_drop_path_rates_are_linear():
    assert ConvNextConfig(num_stages=2, hidden_sizes=[4, 8], depths=[2, 3], drop_path_rate=0.4).drop_path_rates == [
        pytest.approx([0.0, 0.1]),
        pytest.approx([0.2, 0.3, 0.4]),
    ]
    assert ConvNextConfig(num_stages=1, hidden_sizes=[4], depths=[1], drop_path_rate=0.4).drop_path_rates == [[0.0]]


@pytest.mark.parametrize(
    ("variant", "millions"), [("tiny", 28.6), ("small", 50.2), ("base", 88.6), ("large", 197.8), ("xlarge", 350.2)]
)
def test_variants_have_the_papers_size(variant, millions):
    model = ConvNext(variant, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_every_variant_builds():
    for variant in VARIANTS:
        assert ConvNext(variant, device="meta", num_classes=3).num_classes == 3


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_channels": 0}, ValueError, "num_channels is 0: expected an integer of at least 1"),
        ({"num_channels": 3.0}, TypeError, "num_channels is 3.0: expected an integer"),
        ({"num_channels": True}, TypeError, "num_channels is True"),
        ({"patch_size": [4, 4, 4]}, ValueError, "patch_size"),
        ({"patch_size": "4"}, TypeError, "patch_size"),
        ({"hidden_sizes": [96, 192]}, ValueError, "2 values: expected one for each of num_stages=4"),
        ({"hidden_sizes": [96, 192, -1, 4]}, ValueError, r"hidden_sizes\[2\] is -1"),
        ({"depths": "3393"}, TypeError, "depths"),
        ({"depths": [1, 1, 1]}, ValueError, "depths"),
        ({"hidden_act": "quick_gelu"}, ValueError, "hidden_act is 'quick_gelu': expected one of gelu"),
        ({"hidden_act": None}, TypeError, "hidden_act"),
        ({"initializer_range": -1.0}, ValueError, "initializer_range"),
        ({"layer_norm_eps": "1e-6"}, TypeError, "layer_norm_eps"),
        ({"layer_norm_eps": float("nan")}, ValueError, "layer_norm_eps"),
        ({"layer_scale_init_value": "no"}, TypeError, "layer_scale_init_value"),
        ({"drop_path_rate": 1.5}, ValueError, r"drop_path_rate is 1.5: expected a number in \[0, 1\]"),
        ({"image_size": 0}, ValueError, "image_size"),
        ({"out_features": ["stage9"]}, ValueError, r"out_features is \['stage9'\]: expected distinct names"),
        ({"out_features": ["stage2", "stage1"]}, ValueError, "expected the order"),
        ({"out_features": "stage1"}, TypeError, "out_features"),
        ({"out_indices": [7]}, ValueError, "out_indices"),
        ({"out_indices": [2, 1]}, ValueError, "increasing"),
        ({"out_indices": [1], "out_features": ["stage2"]}, ValueError, "differ"),
        ({"num_labels": -1}, ValueError, "num_labels"),
        ({"num_labels": 3, "id2label": {0: "a"}}, ValueError, "num_labels is 3 but id2label names 1"),
        ({"id2label": ["a"]}, TypeError, "id2label is a list"),
        ({"id2label": {"a": 0}}, ValueError, "expected class indices"),
        ({"label2id": ["a"]}, TypeError, "label2id is a list"),
        ({"problem_type": "ranking"}, ValueError, "problem_type is 'ranking'"),
        ({"model_type": "convnextv2"}, ValueError, "model_type is 'convnextv2': expected 'convnext'"),
    ],
)
def test_invalid_values_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        ConvNextConfig(**fields)


def test_files_without_a_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config"):
        ConvNextConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hugging Face hub id"):
        ConvNextConfig.from_pretrained(tmp_path / "missing")
    with pytest.raises(TypeError, match="source is a int"):
        ConvNextConfig.from_pretrained(3)
    for text, message in [
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ('{"model_type": "vit"}', "type 'vit'"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ConvNextConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected one of atto"):
        ConvNextConfig.from_variant("huge")
    with pytest.raises(TypeError, match="mapping"):
        ConvNextConfig.from_dict([])


def test_hub_id_not_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="someone/never-published is not a "):
        ConvNextConfig.from_pretrained("someone/never-published")


def test_classes_are_ordered_by_index_not_by_file_order():
    """JSON sorts "10" before "2"."""
    names = {i: f"name {i}" for i in range(12)}
    text = json.dumps(ConvNextConfig(id2label=names).to_dict(), sort_keys=True)
    assert list(ConvNextConfig.from_dict(json.loads(text)).id2label.items()) == list(names.items())
