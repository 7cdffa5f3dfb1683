"""Files that a few bytes make huge, or that hold tensors of another kind: refused by name before anything is built."""

from __future__ import annotations

import json
import resource
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from training_support import tiny_config

from convnext_fast import ConvNext, ConvNextConfig
from convnext_fast.checkpoints.load_save import load_checkpoint, load_model

MODEL = ConvNext(tiny_config())


def with_tensor(path, tensor, name="head.fc.bias"):
    torch.save(OrderedDict(MODEL.state_dict()) | {name: tensor}, path)
    return path


HUGE = {
    "expanded": torch.zeros(1).expand(1 << 20, 1 << 20),
    "zero stride in one": torch.zeros(4, 1).expand(4, 1 << 30),
    "windows": torch.zeros(64).as_strided((32, 32), (1, 1)),
    "sizes that overflow": torch.zeros(1).as_strided((1 << 31, 1 << 31), (0, 0)),
}
OTHER = {
    "sparse": torch.eye(3).to_sparse(),
    "compressed rows": torch.eye(3).to_sparse_csr(),
    "meta": torch.empty(3, device="meta"),
    "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
}


@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("name", ["head.fc.bias", "stem.0.weight"])
def test_a_tensor_larger_than_its_file(tmp_path, kind, name):
    path = with_tensor(tmp_path / "x.pth", HUGE[kind], name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"x\.pth: {name} has shape .* bytes, of which the file holds"):
        load_model(ConvNext, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # kB


@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.filterwarnings("ignore:.*Sparse|.*nested|.*sparse")
def test_a_tensor_of_another_kind(tmp_path, kind):
    path = with_tensor(tmp_path / "x.pth", OTHER[kind])
    with pytest.raises(ValueError, match=r"x\.pth"):
        load_model(ConvNext, path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_dtypes_without_arithmetic(tmp_path, suffix):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in MODEL.state_dict().items()}
    path = tmp_path / f"x.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    with pytest.raises(ValueError, match=r"float8_e4m3fn, in which PyTorch cannot compute: pass dtype="):
        load_model(ConvNext, path)
    assert load_model(ConvNext, path, dtype="float32")(torch.zeros(1, 1, 8, 8)).shape == (1, 2)


def rewritten(source, target, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return target


def test_archives_that_promise_more_than_they_hold(tmp_path):
    torch.save(MODEL.state_dict(), tmp_path / "good.pth")
    with pytest.raises(ValueError, match="is a compressed archive"):
        load_model(ConvNext, rewritten(tmp_path / "good.pth", tmp_path / "small.pth", zipfile.ZIP_DEFLATED))
    content = bytearray((tmp_path / "good.pth").read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 20 : directory + 28] = (1 << 31).to_bytes(4, "little") * 2
    (tmp_path / "lies.pth").write_bytes(content)
    with pytest.raises(ValueError, match="its directory claims 2,1"):
        load_model(ConvNext, tmp_path / "lies.pth")


def test_more_tensors_than_any_model_has(tmp_path):
    one = torch.zeros(1)
    torch.save({f"stages.0.blocks.{i}.gamma": one for i in range(70_000)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"holds 70,000 tensors: expected at most 65,536"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_sizes": [10**9] * 4}, r"hidden_sizes\[0\] is 1000000000: expected an integer of at most 65,536"),
        ({"hidden_sizes": [1 << 16] * 4}, r"parameters: expected at most 1,073,741,824"),
        ({"depths": [10**6] * 4}, r"depths\[0\] is 1000000: expected an integer of at most 1,024"),
        ({"depths": [1000] * 4}, r"expected at most 1,024 blocks in all"),
        ({"num_stages": 10**6}, r"num_stages is 1000000: expected an integer of at most 14"),
        ({"num_labels": 10**9}, r"num_labels is 1000000000: expected an integer of at most 131,072"),
        ({"num_channels": 10**9}, r"num_channels is 1000000000: expected"),
        ({"patch_size": 10**9}, r"patch_size is 1000000000: expected"),
        ({"image_size": [1, 10**9]}, r"image_size\[1\] is 1000000000: expected"),
        ({"depths": [1] * 100_000}, r"depths has 100,000 values: expected at most 15"),
    ],
)
def test_sizes_have_bounds(tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        ConvNextConfig(**fields)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "convnext"} | fields))
    with pytest.raises(ValueError, match=rf"config\.json: .*{words}"):
        ConvNextConfig.from_pretrained(tmp_path)


def test_the_largest_variants_are_within_the_bounds():
    assert ConvNextConfig.from_variant("xxlarge", num_labels=21_841).num_labels == 21_841
    ConvNextConfig(num_channels=4096, image_size=8192, num_labels=1 << 17)


def test_keys_named_like_arguments(tmp_path):
    fields = {"self": 1, "cls": 2, "name": 3, "extra": {"self": 4}}
    config = ConvNextConfig.from_dict(fields)
    assert {k: v for k, v in config.to_dict().items() if k in fields} == fields
    config.save_pretrained(tmp_path)
    assert ConvNextConfig.from_pretrained(tmp_path) == config
