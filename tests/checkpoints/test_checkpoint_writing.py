"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os

import pytest
from checkpoint_cases import model_of, same

from convnext_fast import ConvNextForImageClassification
from convnext_fast.checkpoints.load_save import load_model, save_model
from convnext_fast.files import write_files

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


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
    broken.config.unwritable = object()
    with pytest.raises(TypeError):
        save_model(broken, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_over_another_layout_removes_old_weights(tmp_path):
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
def test_files_have_the_usual_permissions(tmp_path):
    save_model(model_of(), tmp_path)
    (tmp_path / "plain").touch()
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes
