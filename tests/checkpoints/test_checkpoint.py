"""Loading and saving every kind of file and folder, with transformers' own classes as the judge."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
import transformers
from checkpoint_cases import FIELDS, image, model_of, same
from fresh import python
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import FLOAT32_BOUND, randomise, relative_error

import convnext_fast
from convnext_fast import ConvNext, ConvNextForImageClassification, ConvNextModel
from convnext_fast.checkpoints.formats import FORMATS, from_timm
from convnext_fast.checkpoints.load_save import load_checkpoint, load_model, save_model
from convnext_fast.cli.convert import convert_checkpoint

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


CONFIGS = [
    {**FIELDS, "num_labels": 5},
    {"hidden_sizes": [5, 17], "depths": [2, 1], "num_stages": 2, "num_labels": 3, "layer_scale_init_value": 0.0},
    {"hidden_sizes": [8, 8, 7, 9, 10], "depths": [1, 0, 1, 1, 2], "num_stages": 5, "patch_size": 2, "num_channels": 1},
    {"hidden_sizes": [13], "depths": [2], "num_stages": 1, "patch_size": [3, 2], "hidden_act": "relu", "num_labels": 1},
]
CLASSES = ["ConvNextModel", "ConvNextForImageClassification", "ConvNextBackbone"]


# transformers' own classes


@pytest.mark.parametrize("fields", CONFIGS)
@pytest.mark.parametrize("name", CLASSES)
def test_folders_of_transformers_load_here(name, fields, tmp_path):
    theirs = randomise(getattr(transformers, name)(transformers.ConvNextConfig(**fields)), 1).eval()
    theirs.save_pretrained(tmp_path)
    ours = getattr(convnext_fast, name).from_pretrained(tmp_path)
    assert not ours.training
    assert all(p.requires_grad for p in ours.parameters())
    assert same(ours.state_dict(), theirs.state_dict())
    x = image(ours.config)
    with torch.no_grad():
        assert_outputs_agree(ours(x), theirs(x))


def assert_outputs_agree(ours, theirs):
    for actual, expected in zip(ours.to_tuple(), theirs.to_tuple(), strict=True):
        actual, expected = [t if isinstance(t, tuple) else (t,) for t in (actual, expected)]
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) <= FLOAT32_BOUND


@pytest.mark.parametrize(("fields", "limit"), list(zip(CONFIGS, ["5GB", "3KB", "5GB", "3KB"], strict=True)))
@pytest.mark.parametrize("name", CLASSES)
def test_our_folders_load_in_transformers(name, fields, limit, tmp_path):
    ours = model_of(getattr(convnext_fast, name), fields={"layer_norm_eps": 1e-12, "num_labels": 4, **fields})
    save_model(ours, tmp_path, max_shard_size=limit)
    assert (tmp_path / "model.safetensors").exists() == (limit == "5GB")
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.architectures == [name]
    assert theirs.dtype == torch.float32
    assert same(theirs.state_dict(), ours.state_dict())
    x = image(ours.config)
    with torch.no_grad():
        assert_outputs_agree(ours(x), theirs.eval()(x))


def test_shards_of_transformers_load_here(tmp_path):
    theirs = randomise(transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**CONFIGS[0])))
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        ours = load_model(ConvNextForImageClassification, source)
        assert same(ours.state_dict(), theirs.state_dict())


def test_our_shards_respect_the_size_limit(tmp_path):
    model = model_of(ConvNextForImageClassification)
    save_model(model, tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    for name in set(index["weight_map"].values()):
        shard = load_file(tmp_path / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == shard.keys()
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 4000
    assert same(load_model(ConvNextForImageClassification, tmp_path).state_dict(), model.state_dict())


def test_shards_of_pytorch_bin(tmp_path):
    model = model_of(ConvNextForImageClassification)
    items = list(model.state_dict().items())
    files = {"pytorch_model-00001-of-00002.bin": dict(items[:7]), "pytorch_model-00002-of-00002.bin": dict(items[7:])}
    for name, tensors in files.items():
        torch.save(tensors, tmp_path / name)
    weight_map = {key: name for name, tensors in files.items() for key in tensors}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model.config.save_pretrained(tmp_path)
    assert same(load_model(ConvNextForImageClassification, tmp_path).state_dict(), model.state_dict())


def test_unknown_fields_and_labels_survive(tmp_path):
    config = transformers.ConvNextConfig(**FIELDS, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    config.favourite = {"colour": "blue"}
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path / "a")
    ConvNextForImageClassification.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = transformers.ConvNextConfig.from_pretrained(tmp_path / "b")
    assert again.favourite == {"colour": "blue"}
    assert again.id2label == {0: "cat", 1: "dog"}


# Formats, files and folders


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("where", ["folder", "a.safetensors", "a.pth", "a.bin"])
def test_every_format_in_every_kind_of_file(format, where, tmp_path):
    model = model_of()
    save_model(model, tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / where, format)
    assert load_checkpoint(tmp_path / where).format == format
    again = load_model(ConvNext, tmp_path / where)
    assert same(again.state_dict(), model.state_dict())
    # Only transformers' folder tells a last epsilon; a file of theirs is taken to mean their default.
    expected = 1e-12 if format == "transformers" and where != "folder" else 1e-6
    assert again.head.norm.eps == expected
    convert_checkpoint(tmp_path / where, tmp_path / "back", "timm")
    assert same(load_file(tmp_path / "back" / "model.safetensors"), dict(model.state_dict()))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cls", [ConvNext, ConvNextForImageClassification])
def test_models_save_in_every_format(cls, format, tmp_path):
    model = model_of(cls, fields={"id2label": {i: f"class {i}" for i in range(5)}})
    save_model(model, tmp_path, format=format)
    again = load_model(cls, tmp_path)
    assert same(again.state_dict(), model.state_dict())
    assert again.config.id2label == model.config.id2label
    assert again.config.layer_norm_eps == 1e-6
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert ("model_type" in json.loads((tmp_path / "config.json").read_text())) == (format == "transformers")


def test_official_pickles_nest_under_model(tmp_path):
    save_model(model_of(), tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "a.pth", "official")
    convert_checkpoint(tmp_path / "source", tmp_path / "b.pth", "timm")
    assert torch.load(tmp_path / "a.pth").keys() == {"model"}
    assert "stem.0.weight" in torch.load(tmp_path / "b.pth")


def test_old_pickles_load(tmp_path):
    model = model_of()
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(load_model(ConvNext, tmp_path / "old.pt").state_dict(), model.state_dict())


@pytest.mark.parametrize("names", [("model", "model_ema"), ("state_dict", "state_dict_ema")])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_training_checkpoints(names, prefix, tmp_path):
    plain, averaged = model_of(seed=1), model_of(seed=2)
    states = [from_timm(m.state_dict(), "official") for m in (plain, averaged)]
    content = {name: {prefix + k: v for k, v in s.items()} for name, s in zip(names, states, strict=True)}
    extras = {"optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save({**content, **extras}, tmp_path / "checkpoint-3.pth")
    assert same(load_model(ConvNext, tmp_path / "checkpoint-3.pth").state_dict(), plain.state_dict())
    loaded = load_model(ConvNext, tmp_path / "checkpoint-3.pth", use_ema=True)
    assert same(loaded.state_dict(), averaged.state_dict())
    convert_checkpoint(tmp_path / "checkpoint-3.pth", tmp_path / "ema.safetensors", "timm", use_ema=True)
    assert same(load_file(tmp_path / "ema.safetensors"), dict(averaged.state_dict()))


def test_averaged_weights_need_use_ema(tmp_path):
    state = model_of().state_dict()
    torch.save({"model": state}, tmp_path / "plain.pth")
    torch.save({"model_ema": state}, tmp_path / "ema.pth")
    with pytest.raises(ValueError, match="no averaged weights for use_ema=True: expected model_ema or state_dict_ema"):
        load_checkpoint(tmp_path / "plain.pth", use_ema=True)
    with pytest.raises(ValueError, match="only averaged weights: pass use_ema=True"):
        load_checkpoint(tmp_path / "ema.pth")


def test_timm_hub_folder(tmp_path):
    model = model_of()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fields = {
        "architecture": "convnext_tiny",
        "num_classes": 5,
        "model_args": {"act_layer": "gelu_tanh", "norm_eps": 1e-5},
        "pretrained_cfg": {"input_size": [3, 288, 288]},
        "label_names": ["n1", "n2", "n3", "n4", "n5"],
        "label_descriptions": {"n2": "goldfish"},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = load_model(ConvNext, tmp_path)
    assert loaded.config.id2label == {0: "n1", 1: "goldfish", 2: "n3", 3: "n4", 4: "n5"}
    assert loaded.config.hidden_act == "gelu_new"
    assert loaded.config.norm_eps == loaded.config.layer_norm_eps == 1e-5
    assert loaded.config.image_size == 288
    assert same(loaded.state_dict(), model.state_dict())


def test_timm_head_round_trips(tmp_path):
    for options in ({"head_norm_first": True}, {"global_pool": "max"}):
        model = model_of(**options)
        save_model(model, tmp_path)
        again = load_model(ConvNext, tmp_path)
        with torch.no_grad():
            assert torch.equal(again(image(model.config)), model(image(model.config)))
        for cls in (ConvNextModel, ConvNextForImageClassification):
            with pytest.raises(ValueError, match=r"before pooling|max pooling"):
                load_model(cls, tmp_path)
        for format in ("transformers", "torchvision", "official"):
            with pytest.raises(ValueError, match=r"expected timm|before the pooling"):
                save_model(model, tmp_path / "other", format=format)
            with pytest.raises(ValueError, match=r"expected timm|before the pooling"):
                convert_checkpoint(tmp_path, tmp_path / "other", format)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("fields", "format", "lost"),
    [
        ({"norm_eps": 1e-5, "layer_norm_eps": 1e-5}, "transformers", "norm_eps=1e-06 instead of 1e-05"),
        ({"layer_norm_eps": 1e-5}, "timm", "layer_norm_eps=1e-06 instead of 1e-05"),
        ({"hidden_act": "relu"}, "torchvision", "gelu instead of relu"),
        ({"hidden_act": "silu", "layer_norm_eps": 1e-3}, "official", "layer_norm_eps=1e-06 .* gelu instead of silu"),
    ],
)
def test_a_warning_for_what_a_format_cannot_express(fields, format, lost, tmp_path):
    model = model_of(ConvNextForImageClassification, fields=fields)
    with pytest.warns(UserWarning, match=lost):
        save_model(model, tmp_path, format=format)
    again = load_model(ConvNextForImageClassification, tmp_path)
    assert again.config.to_dict().items() >= fields.items()


# The hub


def test_hub_ids_come_from_the_cache_when_offline(tmp_path):
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--convnext"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    save_model(model_of(ConvNextForImageClassification), repository / "snapshots" / commit, max_shard_size="10KB")
    program = (
        "import convnext_fast as c, sys\n"
        "m = c.ConvNextForImageClassification.from_pretrained('someone/convnext')\n"
        "print(m.num_parameters())\n"
        "try:\n    c.ConvNext.from_pretrained('someone/other')\n"
        "except FileNotFoundError as error:\n    print(error)\n"
        "sys.modules['huggingface_hub'] = None\n"
        "try:\n    c.ConvNext.from_pretrained('someone/convnext')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    run = python(program, HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    parameters, missing, extra = run.stdout.strip().split("\n")
    assert int(parameters) == model_of(ConvNextForImageClassification).num_parameters()
    assert "someone/other" in missing
    assert "'.[hub]'" in extra
