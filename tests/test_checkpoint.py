"""Loading and saving: every kind of file and folder, transformers' own classes as the judge, and every failure."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import FLOAT32_BOUND, randomise, relative_error

import convnext_fast
from convnext_fast import ConvNext, ConvNextBackbone, ConvNextConfig, ConvNextForImageClassification, ConvNextModel
from convnext_fast.checkpoint import convert_checkpoint, load_checkpoint, load_model, save_model
from convnext_fast.checkpoint_files import size_in_bytes, write_files
from convnext_fast.checkpoint_formats import FORMATS, from_timm

FIELDS = {"hidden_sizes": [6, 9, 12, 15], "depths": [1, 2, 1, 1]}
CONFIGS = [
    {**FIELDS, "num_labels": 5},
    {"hidden_sizes": [5, 17], "depths": [2, 1], "num_stages": 2, "num_labels": 3, "layer_scale_init_value": 0.0},
    {"hidden_sizes": [8, 8, 7, 9, 10], "depths": [1, 0, 1, 1, 2], "num_stages": 5, "patch_size": 2, "num_channels": 1},
    {"hidden_sizes": [13], "depths": [2], "num_stages": 1, "patch_size": [3, 2], "hidden_act": "relu", "num_labels": 1},
]
CLASSES = ["ConvNextModel", "ConvNextForImageClassification", "ConvNextBackbone"]


@pytest.fixture(autouse=True)
def _no_unexpected_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def model_of(cls=ConvNext, seed=0, **options):
    fields = {**FIELDS, "num_labels": 5, "layer_norm_eps": 1e-6, **options.pop("fields", {})}
    return randomise(cls(ConvNextConfig(**fields), **options), seed).eval()


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def image(config, batch=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, config.num_channels, 45, 70, generator=generator)


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


def test_our_shards_hold_to_their_limit(tmp_path):
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


def test_averaged_weights_are_asked_for(tmp_path):
    state = model_of().state_dict()
    torch.save({"model": state}, tmp_path / "plain.pth")
    torch.save({"model_ema": state}, tmp_path / "ema.pth")
    with pytest.raises(ValueError, match="no averaged weights for use_ema=True: expected model_ema or state_dict_ema"):
        load_checkpoint(tmp_path / "plain.pth", use_ema=True)
    with pytest.raises(ValueError, match="averaged weights alone: pass use_ema=True"):
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


def test_timm_head_comes_back(tmp_path):
    for options in ({"head_norm_first": True}, {"global_pool": "max"}):
        model = model_of(**options)
        save_model(model, tmp_path)
        again = load_model(ConvNext, tmp_path)
        with torch.no_grad():
            assert torch.equal(again(image(model.config)), model(image(model.config)))
        for cls in (ConvNextModel, ConvNextForImageClassification):
            with pytest.raises(ValueError, match=r"before pooling|by maximum"):
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
def test_what_a_format_cannot_say_is_warned_about(fields, format, lost, tmp_path):
    model = model_of(ConvNextForImageClassification, fields=fields)
    with pytest.warns(UserWarning, match=lost):
        save_model(model, tmp_path, format=format)
    again = load_model(ConvNextForImageClassification, tmp_path)
    assert again.config.to_dict().items() >= fields.items()


# Models of other kinds than the checkpoint's


def test_bare_model_from_a_classifier(tmp_path):
    source = model_of(ConvNextForImageClassification)
    save_model(source, tmp_path)
    assert same(load_model(ConvNextModel, tmp_path).state_dict(), source.convnext.state_dict())
    assert load_model(ConvNext, tmp_path, num_classes=0).get_classifier().state_dict() == {}


@pytest.mark.parametrize(("cls", "classifier"), [(ConvNextForImageClassification, "classifier"), (ConvNext, "head.fc")])
def test_classifier_from_a_bare_model(cls, classifier, tmp_path):
    source = model_of(ConvNextModel)
    save_model(source, tmp_path)
    with pytest.warns(UserWarning, match=rf"new values for {classifier}\.weight, {classifier}\.bias"):
        model = load_model(cls, tmp_path, num_labels=400)
    layer = model.get_submodule(classifier)
    assert layer.weight.shape == (400, 15)
    assert abs(layer.weight.std().item() - 0.02) < 0.002
    assert not layer.bias.any()
    base = ConvNextModel.from_pretrained(tmp_path)
    assert all(base.state_dict()[k].sum() == t.sum() for k, t in source.state_dict().items())


def test_backbone_from_a_classifier(tmp_path):
    source = model_of(ConvNextForImageClassification, fields={"out_features": ["stage2", "stage4"]})
    save_model(source, tmp_path)
    with pytest.warns(UserWarning, match=r"hidden_states_norms\.stage2\.weight.*head\.fc\.weight.*left out"):
        model = load_model(ConvNextBackbone, tmp_path)
    norm = model.hidden_states_norms["stage4"]
    assert torch.equal(norm.weight, torch.ones(15))
    assert not norm.bias.any()
    with torch.no_grad():
        x = image(source.config)
        expected = source(x, output_hidden_states=True).hidden_states[2]
        actual = model(x).feature_maps[0]
    expected = torch.nn.functional.layer_norm(expected.permute(0, 2, 3, 1), (9,), eps=1e-6).permute(0, 3, 1, 2)
    assert relative_error(actual, expected) <= FLOAT32_BOUND


def test_from_a_backbone(tmp_path):
    source = model_of(ConvNextBackbone, fields={"out_features": ["stem", "stage4"]})
    save_model(source, tmp_path)
    assert same(load_model(ConvNextBackbone, tmp_path).state_dict(), source.state_dict())
    features = load_model(ConvNext, tmp_path, features_only=True)
    assert torch.equal(features.stem[0].weight, source.embeddings.patch_embeddings.weight)
    with pytest.warns(UserWarning, match=r"new values for layernorm\.weight, layernorm\.bias, .*left out"):
        model = load_model(ConvNextModel, tmp_path)
    assert torch.equal(model.layernorm.weight, torch.ones(15))
    with pytest.raises(ValueError, match=r"no name for hidden_states_norms\.stage4"):
        convert_checkpoint(tmp_path, tmp_path / "timm", "timm")
    convert_checkpoint(tmp_path, tmp_path / "again", "transformers")
    assert same(load_model(ConvNextBackbone, tmp_path / "again").state_dict(), source.state_dict())
    config = ConvNextConfig.from_pretrained(tmp_path, out_features=["stem", "stage1"])
    with pytest.warns(UserWarning, match=r"new values for hidden_states_norms\.stage1\.weight"):
        other = load_model(ConvNextBackbone, tmp_path, config=config)
    assert torch.equal(other.hidden_states_norms["stem"].weight, source.hidden_states_norms["stem"].weight)


def test_features_only(tmp_path):
    source = model_of()
    save_model(source, tmp_path / "full")
    features = load_model(ConvNext, tmp_path / "full", features_only=True, out_indices=[0, 2])
    flat = {k.replace("stages.", "stages_").replace("stem.", "stem_"): v for k, v in features.state_dict().items()}
    torch.save(flat, tmp_path / "flat.pth")
    again = load_model(ConvNext, tmp_path / "flat.pth", features_only=True, out_indices=[0, 2])
    x = image(source.config)
    with torch.no_grad():
        expected = source.forward_intermediates(x, [0, 2], intermediates_only=True)
        for maps in (features(x), again(x)):
            assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    convert_checkpoint(tmp_path / "flat.pth", tmp_path / "official.pth", "official")
    assert "norm.weight" not in torch.load(tmp_path / "official.pth")["model"]


def test_another_number_of_classes(tmp_path):
    source = model_of(ConvNextForImageClassification)
    save_model(source, tmp_path)
    with pytest.raises(ValueError, match=r"2 of a wrong shape: classifier.weight \(5, 15\), expected \(300, 15\)") as e:
        load_model(ConvNextForImageClassification, tmp_path, num_labels=300)
    assert "ignore_mismatched_sizes=True" in str(e.value)
    with pytest.warns(UserWarning, match=r"new classifier.*classifier.weight \(5, 15\), expected \(300, 15\)"):
        model = load_model(ConvNextForImageClassification, tmp_path, num_labels=300, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 300
    assert abs(model.classifier.weight.std().item() - 0.02) < 0.002
    assert not model.classifier.bias.any()
    assert same(model.convnext.state_dict(), source.convnext.state_dict())
    same_size = load_model(ConvNextForImageClassification, tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert same(same_size.state_dict(), source.state_dict())


def test_only_the_classifier_may_differ(tmp_path):
    save_model(model_of(), tmp_path)
    config = ConvNextConfig(**{**FIELDS, "hidden_sizes": [6, 9, 12, 16]}, num_labels=5)
    with pytest.raises(
        ValueError, match=r"stages\.3\.downsample\.1\.weight \(15, 12, 2, 2\), expected \(16, 12, 2, 2\)"
    ):
        load_model(ConvNext, tmp_path, config=config, ignore_mismatched_sizes=True)


# How parameters come out


def test_dtype_and_device(tmp_path):
    save_model(model_of().half(), tmp_path)
    assert {p.dtype for p in load_model(ConvNext, tmp_path).parameters()} == {torch.float16}
    wide = load_model(ConvNext, tmp_path, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    with pytest.warns(UserWarning, match="new classifier"):
        mixed = load_model(ConvNext, tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert mixed.head.fc.weight.dtype == torch.float16
    state = model_of().half().state_dict()
    state["head.fc.weight"] = state["head.fc.weight"].float()
    torch.save(state, tmp_path / "mixed.pth")
    assert {p.dtype for p in load_model(ConvNext, tmp_path / "mixed.pth").parameters()} == {torch.float32}
    state["head.fc.weight"] = state["head.fc.weight"].to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match=r"mixes torch\..*pass dtype="):
        load_model(ConvNext, tmp_path / "mixed.pth")


def test_loading_draws_no_random_numbers_and_parameters_train(tmp_path):
    save_model(model_of(), tmp_path)
    before = torch.get_rng_state()
    model = load_model(ConvNext, tmp_path).train()
    assert torch.equal(torch.get_rng_state(), before)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image(model.config)).square().sum().backward()
    optimiser.step()
    model.save_pretrained(tmp_path)
    again = load_model(ConvNext, tmp_path)
    assert same(again.state_dict(), model.state_dict())
    assert not same(again.state_dict(), model_of().state_dict())


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_loaded_model_does_not_depend_on_its_file(name, tmp_path):
    model = model_of()
    save_model(model, tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / name, "timm")
    again = load_model(ConvNext, tmp_path / name)
    (tmp_path / name).write_bytes(b"\0" * (tmp_path / name).stat().st_size)
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["folder", "a.pth"])
def test_any_memory_layout_is_written(name, tmp_path):
    model = model_of().to(memory_format=torch.channels_last)
    model.head.norm.bias = model.stages[3].blocks[0].norm.bias  # one tensor in two places
    model.freeze()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    save_model(model, tmp_path / "folder")
    convert_checkpoint(tmp_path / "folder", tmp_path / name, "timm")
    assert same(load_model(ConvNext, tmp_path / name).state_dict(), expected)
    assert os.path.getsize(tmp_path / "folder" / "model.safetensors") < 1.5 * sum(t.nbytes for t in expected.values())


# Failures


def corrupt(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(name, keep, tmp_path):
    save_model(model_of(), tmp_path)
    convert_checkpoint(tmp_path, tmp_path / name, "timm")
    corrupt(tmp_path / name, keep)
    with pytest.raises(ValueError, match=f"{name} is no .*damaged"):
        load_model(ConvNext, tmp_path / name)


class Payload:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    payload = Payload()
    payload.path = str(tmp_path / "ran")
    torch.save({"stem.0.weight": torch.ones(1), "payload": payload}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth is a pickle that wants posix\.mkdir run") as error:
        load_model(ConvNext, tmp_path / "evil.pth")
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    torch.save(model_of(), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"ConvNext run or built.*state_dict"):
        load_model(ConvNext, tmp_path / "whole.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds a Tensor: expected a dict"),
        ([1, 2], "holds a list"),
        ({"net": {"stem.0.weight": torch.ones(3)}}, "'net', a dict: expected tensors"),
        ({"stem.0.weight": torch.ones(3), 4: torch.ones(3)}, "holds 4"),
        ({}, "no tensors"),
        ({"model": {}}, "no tensors"),
        ({"conv1.weight": torch.ones(3), "fc.weight": torch.ones(3)}, "not the keys of a ConvNeXt.*conv1.weight"),
        ({"stages.0.0.grn.gamma": torch.ones(3)}, "ConvNeXt V2"),
    ],
)
def test_pickles_of_other_things(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "x.pth")


def test_all_keys_that_do_not_fit_are_listed(tmp_path):
    state = dict(model_of(fields={"depths": [1, 8, 1, 1]}).state_dict())
    for key in ("stem.1.bias", "stages.3.blocks.0.norm.weight"):
        del state[key]
    state["stages.0.attention.weight"] = torch.ones(3)
    state["stages.2.blocks.0.gamma"] = torch.ones(3)
    state["head.fc.bias"] = torch.ones(5, dtype=torch.int32)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="does not fit ConvNextForImageClassification") as error:
        load_model(ConvNextForImageClassification, tmp_path / "x.pth")
    for text in (
        "2 missing: convnext.embeddings.layernorm.bias, convnext.encoder.stages.3.layers.0.layernorm.weight",
        "1 unexpected: stages.0.attention.weight",
        "layer_scale_parameter (3,), expected (12,)",
        "classifier.bias of torch.int32, expected a floating dtype",
    ):
        assert text in str(error.value), str(error.value)
    config = ConvNextConfig(**FIELDS, num_labels=5)
    with pytest.raises(ValueError, match=r"55 unexpected: .*, … and 35 more") as error:
        load_model(ConvNext, tmp_path / "x.pth", config=config)
    assert str(error.value).count("blocks.") < 40
    with pytest.raises(ValueError, match="does not fit"):
        convert_checkpoint(tmp_path / "x.pth", tmp_path / "y.pth", "official")
    assert not (tmp_path / "y.pth").exists()


def test_a_head_is_whole_or_absent(tmp_path):
    save_model(model_of(), tmp_path)
    with pytest.raises(ValueError, match=r"(?s)2 missing: norm_pre\.weight.*2 unexpected: head\.norm"):
        load_model(ConvNext, tmp_path, head_norm_first=True)
    state = dict(model_of().state_dict())
    for key in ("head.norm.weight", "head.norm.bias"):
        state.pop(key)
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"missing: head\.norm\.weight"):
            load_model(ConvNext, tmp_path / "x.pth")
    state = dict(model_of().state_dict())
    del state["head.fc.bias"]
    torch.save(state, tmp_path / "x.pth")
    for ignore in (False, True):
        with pytest.raises(ValueError, match=r"1 missing: head\.fc\.bias"):
            load_model(ConvNext, tmp_path / "x.pth", ignore_mismatched_sizes=ignore)


def test_config_that_does_not_match_its_weights(tmp_path):
    model = model_of(ConvNextForImageClassification)
    save_model(model, tmp_path)
    ConvNextConfig(**{**FIELDS, "depths": [1, 1, 1, 1]}, num_labels=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"9 unexpected: stages\.1\.layers|9 unexpected"):
        load_model(ConvNextForImageClassification, tmp_path)
    with pytest.raises(ValueError, match="9 unexpected"):
        convert_checkpoint(tmp_path, tmp_path / "out", "timm")


def test_incomplete_folders(tmp_path):
    save_model(model_of(), tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: give the weights file itself"):
        load_model(ConvNext, tmp_path / "a")
    config = ConvNextConfig(**FIELDS, num_labels=5)
    assert same(load_model(ConvNext, tmp_path / "a", config=config).state_dict(), model_of().state_dict())
    config.save_pretrained(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors or model\.safetensors\.index\.json or"):
        load_model(ConvNext, tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_model(ConvNext, "absent.pth")
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        load_model(ConvNext, tmp_path / "absent")
    (tmp_path / "b" / "weights.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(ConvNext, tmp_path / "b" / "weights.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON list"),
        ('{"model_type": "convnextv2"}', "type 'convnextv2'"),
        ('{"model_type": "dinov3_convnext"}', "type 'dinov3_convnext'"),
        ('{"architecture": "resnet50"}', "timm's 'resnet50'"),
        ('{"architecture": "convnextv2_tiny"}', "timm's 'convnextv2_tiny'"),
        ('{"hidden_sizes": [1]}', "type None"),
        ('{"model_type": "convnext", "depths": [1]}', "depths"),
        ('{"model_type": "convnext", "depths": "many"}', "config.json: depths is 'many'"),
        ('{"convnext_fast": [1]}', "config.json, convnext_fast: a configuration is a mapping"),
        ('{"architecture": "convnext_tiny", "model_args": {"act_layer": "mish"}}', "hidden_act is 'mish'"),
        ('{"architecture": "convnext_tiny", "model_args": {"act_layer": 3}}', "hidden_act is 3"),
    ],
)
def test_other_configs(text, message, tmp_path):
    save_model(model_of(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(ConvNext, tmp_path)


def test_broken_indices(tmp_path):
    model = model_of(ConvNextForImageClassification)
    save_model(model, tmp_path, max_shard_size="10KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1

    def fails_with(error, message, weight_map):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error, match=message):
            load_model(ConvNextForImageClassification, tmp_path)

    fails_with(ValueError, "no index", None)
    fails_with(ValueError, "no index", {})
    fails_with(ValueError, r"names the file '\.\./x\.safetensors'", {"a": "../x.safetensors"})
    fails_with(ValueError, "names the file 3", {"a": 3})
    fails_with(ValueError, f"places nonsense in {shards[0]}", index["weight_map"] | {"nonsense": shards[0]})
    (tmp_path / shards[1]).unlink()
    fails_with(FileNotFoundError, f"names the shard {shards[1]}, which is missing", index["weight_map"])


def test_wrong_arguments(tmp_path):
    save_model(model_of(), tmp_path)
    with pytest.raises(TypeError, match="source is a int"):
        load_model(ConvNext, 3)
    with pytest.raises(TypeError, match=r"cls is .*Linear"):
        load_model(torch.nn.Linear, tmp_path)
    for dtype in ("float32", torch.int8):
        with pytest.raises(TypeError, match=r"dtype is .*expected a floating"):
            load_model(ConvNext, tmp_path, dtype=dtype)
    with pytest.raises(TypeError, match="config is a dict"):
        load_model(ConvNext, tmp_path, config={})
    with pytest.raises(TypeError, match=r"model is a DataParallel.*the model within"):
        save_model(torch.nn.DataParallel(model_of()), tmp_path)
    with pytest.raises(ValueError, match="format is 'onnx'"):
        save_model(model_of(), tmp_path, format="onnx")
    with pytest.raises(ValueError, match="format is 'onnx'"):
        convert_checkpoint(tmp_path, tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match="meta device"):
        save_model(ConvNext("atto", device="meta"), tmp_path / "x")
    for size in ("huge", "5XB", 0, -1, "0GB", True, None, "5 B B"):
        with pytest.raises(ValueError, match="the size is"):
            save_model(model_of(), tmp_path, max_shard_size=size)


def test_sizes():
    cases = {"5GB": 5 * 10**9, "200MB": 2 * 10**8, "1.5KiB": 1536, 77: 77, "77": 77, " 3 kb ": 3000, "2GiB": 2**31}
    assert {size: size_in_bytes(size) for size in cases} == cases


# Writing


def test_a_failed_write_changes_nothing(tmp_path):
    save_model(model_of(seed=1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_files(tmp_path, {"model.safetensors": lambda path: path.write_bytes(b"new"), "config.json": fail})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    broken = model_of(seed=2)
    broken.config.extra["unwritable"] = object()
    with pytest.raises(TypeError):
        save_model(broken, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_over_another_layout_leaves_no_old_weights(tmp_path):
    for limit in ("5KB", "20KB", "5GB", "20KB"):
        model = model_of(ConvNextForImageClassification, seed=len(limit))
        save_model(model, tmp_path, max_shard_size=limit)
        assert same(load_model(ConvNextForImageClassification, tmp_path).state_dict(), model.state_dict())
        names = {path.name for path in tmp_path.iterdir()} - {"config.json"}
        if limit == "5GB":
            assert names == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            assert names == {"model.safetensors.index.json", *index["weight_map"].values()}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_have_the_permissions_of_any_new_file(tmp_path):
    save_model(model_of(), tmp_path)
    (tmp_path / "plain").touch()
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes


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
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    parameters, missing, extra = run.stdout.strip().split("\n")
    assert int(parameters) == model_of(ConvNextForImageClassification).num_parameters()
    assert "someone/other" in missing
    assert "convnext-fast[hub]" in extra
