"""`ConvNextConfig` behaves as that of transformers: loading options, fields that follow from others, JSON."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers

from convnext_fast import ConvNextConfig, ConvNextV2Config
from convnext_fast.huggingface.hub import Loading, split_loading

LOADING = {
    "revision": "main",
    "subfolder": "inner",
    "token": "hf_x",
    "cache_dir": "cache",
    "local_files_only": True,
    "force_download": False,
    "trust_remote_code": False,
    "_from_auto": True,
}


def test_loading_options_say_where_to_look_and_are_never_saved(tmp_path):
    ConvNextConfig(num_labels=3).save_pretrained(tmp_path / "inner")
    options = {**LOADING, "cache_dir": str(tmp_path / "cache")}
    for kind in (ConvNextConfig, transformers.ConvNextConfig):
        read = kind.from_pretrained(tmp_path, **options)
        assert read.num_labels == 3
        read.save_pretrained(tmp_path / kind.__module__)
        written = json.loads((tmp_path / kind.__module__ / "config.json").read_text())
        assert not written.keys() & {*options, "name_or_path", "_name_or_path"}
    assert ConvNextConfig.from_pretrained(tmp_path / "inner").name_or_path == str(tmp_path / "inner")
    with pytest.raises(FileNotFoundError, match="holds no config"):
        ConvNextConfig.from_pretrained(tmp_path, subfolder="other")


def test_loading_options_reach_the_hub(monkeypatch, tmp_path):
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options))
        return tmp_path / name

    ConvNextConfig().save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    options = {name: LOADING[name] for name in Loading._fields[:6]}
    ConvNextConfig.from_pretrained("someone/model", **options)
    assert asked == [("someone/model", "config.json", options)]


def test_every_other_option_is_left():
    assert split_loading({"token": None, "num_labels": 3, "trust_remote_code": True}) == (Loading(), {"num_labels": 3})


def test_names_that_are_no_fields(tmp_path):
    ConvNextConfig(made_by="me").save_pretrained(tmp_path)
    given = {"num_labels": 4, "made_by": "you", "heads": 3, "hidden_size": 7}
    ours, left = ConvNextConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **given)
    theirs, their_left = transformers.ConvNextConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **given)
    assert left == their_left == {"heads": 3, "hidden_size": 7}
    assert (ours.num_labels, ours.made_by) == (theirs.num_labels, theirs.made_by) == (4, "you")
    with pytest.raises(TypeError, match="hidden_size is not a field of a ConvNextConfig: is hidden_sizes meant"):
        ConvNextConfig.from_pretrained(tmp_path, hidden_size=7)
    with pytest.warns(
        UserWarning, match="drop_path_rates_ is not a field of a ConvNextConfig: is drop_path_rate meant"
    ):
        assert ConvNextConfig(drop_path_rates_=0.5).drop_path_rates_ == 0.5
    with pytest.raises(ValueError, match="to_dict is a method of a ConvNextConfig, not a field"):
        ConvNextConfig(to_dict=3)
    kept = ConvNextConfig(activation="odd", _hidden="x")
    assert (kept.activation, kept.to_dict()["activation"]) == ("gelu", "odd")
    assert "_hidden" not in kept.to_dict()


ASSIGNMENTS = [
    {"out_features": ["stem", "stage2"]},
    {"out_indices": [1, 3]},
    {"out_features": None},
    {"out_indices": None},
    {"num_labels": 7},
    {"num_labels": 2},
    {"id2label": {0: "a", 1: "b"}},
    {"num_hidden_layers": 4},
    {"num_channels": 1, "output_hidden_states": True},
]


@pytest.mark.parametrize("fields", ASSIGNMENTS, ids=str)
def test_fields_follow_one_another_when_assigned(fields):
    ours, theirs = ConvNextConfig(num_labels=5, out_features=["stage1"]), transformers.ConvNextConfig(num_labels=5)
    theirs.out_features = ["stage1"]
    for config in (ours, theirs):
        config.update(fields)
    for name in ("out_features", "out_indices", "stage_names", "num_labels", "id2label", "num_stages", *fields):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.label2id == {name: i for i, name in theirs.id2label.items()}
    assert ConvNextConfig.from_dict(ours.to_dict()) == ours


def test_what_follows_from_the_number_of_stages():
    config = ConvNextConfig()
    config.update({"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]})
    assert (config.stage_names, config.out_features, config.out_indices) == (
        ["stem", "stage1", "stage2"],
        ["stage2"],
        [2],
    )
    config.update(config.to_dict())
    config.validate()
    config.depths = [1, 1, 1]
    with pytest.raises(ValueError, match=r"depths is .* expected one for each of num_stages=2"):
        config.validate()
    with pytest.raises(ValueError, match="follow from num_stages"):
        config.stage_names = ["stem"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_stay_lists(kind):
    fields = {"hidden_sizes": kind([8, 16]), "depths": kind([1, 1]), "image_size": kind([32, 40])}
    fields["patch_size"] = kind([4, 2])
    ours, theirs = ConvNextConfig(num_stages=2, **fields), transformers.ConvNextConfig(num_stages=2, **fields)
    for name, value in fields.items():
        assert getattr(ours, name) == getattr(theirs, name) == value
        assert type(getattr(ours, name)) is kind
    assert [8, *ours.hidden_sizes] == [8, 8, 16]


def test_assigned_values_are_checked():
    config = ConvNextConfig()
    for name, value in [("hidden_act", "tanh"), ("num_stages", 0), ("problem_type", "ranking"), ("drop_path_rate", 2)]:
        with pytest.raises(ValueError, match=f"{name} is "):
            setattr(config, name, value)
    with pytest.raises(TypeError, match="id2label is a list"):
        config.id2label = ["a"]
    with pytest.raises(TypeError, match="dtype is 'float12'"):
        config.dtype = "float12"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_labels": 3, "problem_type": "regression"},
        {"out_features": ["stage1"], "output_hidden_states": True, "dtype": "float16"},
        {"return_dict": False, "output_hidden_states": False, "made_by": {"a": [1]}},
    ],
    ids=str,
)
def test_json(fields, tmp_path):
    ours, theirs = ConvNextConfig(**fields), transformers.ConvNextConfig(**fields)
    diff, their_diff = ours.to_diff_dict(), theirs.to_diff_dict()
    expected = json.loads(json.dumps(their_diff))
    for name in ("transformers_version", "norm_eps", "label2id"):
        diff.pop(name, None), expected.pop(name, None)
    assert diff == expected
    assert ours.dtype == theirs.dtype
    assert json.loads(ours.to_json_string(use_diff=False)) == ours.to_dict()
    ours.to_json_file(tmp_path / "x.json")
    for read in (
        ConvNextConfig.from_json_file(tmp_path / "x.json"),
        ConvNextConfig.from_pretrained(tmp_path / "x.json"),
    ):
        assert read == ours
    assert transformers.ConvNextConfig.from_json_file(tmp_path / "x.json").to_dict()["depths"] == list(ours.depths)


def test_a_configuration_of_transformers_by_isinstance():
    config = ConvNextConfig(num_labels=3)
    assert isinstance(config, transformers.PreTrainedConfig)
    assert type(config) is ConvNextConfig
    assert config.__class__.__name__ == "ConvNextConfig"
    for twin in (pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config)):
        assert type(twin) is ConvNextConfig
        assert twin == config
    assert config.get_text_config() is config
    assert config.sub_configs == {}
    config.update_from_string("drop_path_rate=0.25")
    assert config.drop_path_rate == 0.25
    composite = transformers.UperNetConfig(backbone_config=config)
    assert composite.to_dict()["backbone_config"]["model_type"] == "convnext"


def test_upload(monkeypatch, tmp_path):
    calls = []

    class Api:
        def __init__(self, **options):
            calls.append(options)

        def create_repo(self, repo_id, **options):
            calls.append(options)
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, **options):
            calls.append((repo_id, ConvNextConfig.from_pretrained(folder_path).num_labels, options["commit_message"]))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    config = ConvNextConfig(num_labels=torch.tensor(3).item())
    config.push_to_hub("name", token="t", private=True, commit_message="first")
    assert calls == [{"token": "t"}, {"private": True, "exist_ok": True}, ("me/name", 3, "first")]
    config.save_pretrained(tmp_path / "folder", push_to_hub=True)
    assert calls[-1] == ("me/folder", 3, None)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="push_to_hub needs the extra"):
        config.push_to_hub("name")


@pytest.mark.parametrize(
    "key", ["version", "file_name", "kinds", "sub_configs", "transformers_base", "_id2label", "_out_features"]
)
def test_keys_of_a_file_leave_the_class_alone(key):
    read = ConvNextConfig.from_dict({**ConvNextConfig(num_labels=3).to_dict(), key: "1.0"})
    assert getattr(read, key) != "1.0"
    assert read == ConvNextConfig(num_labels=3)


def test_a_subclass_of_ours_replaces_nothing():
    class Mine(ConvNextConfig):
        model_type = "convnext"

    fields = ConvNextConfig().to_dict()
    assert type(ConvNextConfig.from_dict(fields)) is ConvNextConfig
    assert type(Mine.from_dict(fields)) is Mine


def test_v2_has_no_layer_scale_to_assign():
    config = ConvNextV2Config()
    config.layer_scale_init_value = 0.5
    assert config.layer_scale_init_value == 0


def test_options_of_other_configurations_are_left_out(tmp_path):
    ConvNextConfig().save_pretrained(tmp_path)
    options = {"finetuning_task": "x", "proxies": None, "use_auth_token": None, "user_agent": {}}
    assert ConvNextConfig.from_pretrained(tmp_path, **options) == ConvNextConfig()


def test_a_model_type_that_is_no_name():
    with pytest.raises(ValueError, match=r"model_type is \['a'\]: expected 'convnext'"):
        ConvNextConfig.from_dict({"model_type": ["a"]})


def test_the_section_of_this_package_in_a_file(tmp_path):
    """Without a ``model_type`` it is of this model; where it is no section, the file's own fields count."""
    path, fields = tmp_path / "config.json", ConvNextConfig(num_labels=3).to_dict()
    for written in (
        {"convnext_fast": {name: value for name, value in fields.items() if name != "model_type"}},
        {**fields, "convnext_fast": None},
    ):
        path.write_text(json.dumps(written))
        assert ConvNextConfig.from_pretrained(tmp_path).num_labels == 3
    path.write_text(json.dumps({"convnext_fast": {**fields, "model_type": "resnet"}}))
    with pytest.raises(ValueError, match=r"convnext_fast describes a model of type 'resnet'"):
        ConvNextConfig.from_pretrained(tmp_path)
