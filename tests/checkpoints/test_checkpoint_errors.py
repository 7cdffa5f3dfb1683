"""Checkpoints that are damaged, hostile, incomplete or of something else, and arguments that are wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_cases import FIELDS, model_of, same

from convnext_fast import ConvNext, ConvNextConfig, ConvNextForImageClassification
from convnext_fast.checkpoints.load_save import load_checkpoint, load_model, save_model
from convnext_fast.checkpoints.weight_files import size_in_bytes
from convnext_fast.cli.convert import convert_checkpoint

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def corrupt(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(name, keep, tmp_path):
    save_model(model_of(), tmp_path)
    convert_checkpoint(tmp_path, tmp_path / name, "timm")
    corrupt(tmp_path / name, keep)
    with pytest.raises(ValueError, match=f"{name} is not a .*damaged"):
        load_model(ConvNext, tmp_path / name)


class Payload:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    payload = Payload()
    payload.path = str(tmp_path / "ran")
    torch.save({"stem.0.weight": torch.ones(1), "payload": payload}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth is a pickle that would run or build posix\.mkdir") as error:
        load_model(ConvNext, tmp_path / "evil.pth")
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    torch.save(model_of(), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"build .*ConvNext.*state_dict"):
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


def test_a_head_is_complete_or_absent(tmp_path):
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
        ('{"model_type": "convnextv3"}', "type 'convnextv3': expected 'convnext' or 'convnextv2'"),
        ('{"model_type": "dinov3_convnext"}', "type 'dinov3_convnext'"),
        ('{"architecture": "resnet50"}', "timm's 'resnet50'"),
        ('{"hidden_sizes": [1]}', "type None"),
        ('{"model_type": "convnext", "depths": [1]}', "depths"),
        ('{"model_type": "convnext", "depths": "many"}', "config.json: depths is 'many'"),
        ('{"convnext_fast": [1]}', "config.json, convnext_fast: a configuration is a mapping"),
        ('{"architecture": "convnext_tiny", "model_args": {"act_layer": "mish"}}', "hidden_act is 'mish'"),
        ('{"architecture": "convnext_tiny", "model_args": {"act_layer": 3}}', "hidden_act is 3"),
        ('{"architecture": "convnext_tiny", "model_args": {"output_stride": 8}}', "output_stride=8, which dilates"),
        ('{"architecture": "convnext_tiny", "model_args": {"patch_size": 8}}', "patch_size=8, where timm"),
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

    fails_with(ValueError, "not an index", None)
    fails_with(ValueError, "not an index", {})
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
    for dtype in ("float12", torch.int8):
        with pytest.raises(TypeError, match=r"dtype is .*expected a floating"):
            load_model(ConvNext, tmp_path, dtype=dtype)
    with pytest.raises(TypeError, match="config is a dict"):
        load_model(ConvNext, tmp_path, config={})
    with pytest.raises(TypeError, match=r"model is a DataParallel.*the model inside"):
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
