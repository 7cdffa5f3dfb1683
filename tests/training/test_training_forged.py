"""Resuming runs nothing that a checkpoint holds, and refuses what no run has written, by name."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from training_support import Quiet, new_trainer, write_folder

from convnext_fast.files import json_writer, write_files
from convnext_fast.training.image_set import load_folder
from convnext_fast.training.state import FACTS, load_tensors


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that is done."""
    folder = tmp_path_factory.mktemp("run")
    new_trainer(folder).run(Quiet())
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def content_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def test_a_pickle_that_runs_code(run, tmp_path):
    torch.save(content_of(run) | {"history": Evil(tmp_path / "made")}, run / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        new_trainer(run, resume=True)
    assert not (tmp_path / "made").exists()


WRONG = [None, -1, 10**9, 1.5, True, "x", [], {}, [1], {"x": "y"}, torch.zeros(1)]


@pytest.mark.parametrize("entry", ["step", "epoch", "history", "scaler", "identity", "model", "model_ema", "optimizer"])
def test_entries_of_another_kind(run, tmp_path, entry):
    good, trainer = content_of(run), new_trainer(tmp_path / "fresh")
    for wrong in WRONG:
        if entry == "scaler" and wrong == {}:  # as it is in float32
            continue
        torch.save(good | {entry: wrong}, run / "checkpoint.pt")
        with pytest.raises(ValueError, match=r"checkpoint\.pt|cannot resume"):
            trainer._restore(run / "checkpoint.pt")


@pytest.mark.parametrize("name", ["options", "config", "pictures"])
def test_an_identity_of_another_kind(run, tmp_path, name):
    good, trainer = content_of(run), new_trainer(tmp_path / "fresh")
    word = "images" if name == "pictures" else name
    for wrong in WRONG[:-1]:
        torch.save(good | {"identity": good["identity"] | {name: wrong}}, run / "checkpoint.pt")
        with pytest.raises(ValueError, match=f"cannot resume .*its {word}"):
            trainer._restore(run / "checkpoint.pt")


@pytest.fixture
def sharded(run, tmp_path):
    """(folder of a checkpoint in parts, the tensors in it)."""
    content = content_of(run)
    tensors = {name: content[name] for name in ("model", "model_ema", "optimizer")}
    folder = tmp_path / "checkpoint-00000004"
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    write_files(folder, {FACTS: json_writer({k: v for k, v in content.items() if k not in tensors})})
    return folder, tensors


def change_index(folder, change):
    index = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(index) or index))


def test_parts_are_loaded(sharded):
    folder, tensors = sharded
    empty = {name: {k: torch.empty_like(v) for k, v in tensors[name].items()} for name in ("model", "model_ema")}
    load_tensors(folder, empty)
    for name, values in empty.items():
        assert all(torch.equal(value, tensors[name][key]) for key, value in values.items())


def test_an_index_that_runs_code(sharded, tmp_path):
    folder, tensors = sharded

    def put(index):
        index.planner_data = Evil(tmp_path / "made")

    change_index(folder, put)
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        load_tensors(folder, tensors)
    assert not (tmp_path / "made").exists()


def test_entries_that_would_be_unpickled(sharded, tmp_path):
    folder, tensors = sharded

    def put(index):
        index.state_dict_metadata["model.stem.0.weight"] = BytesStorageMetadata()
        place = next(p for key, p in index.storage_data.items() if key.fqn == "model.stem.0.weight")
        evil = tmp_path / "evil"
        torch.save(Evil(tmp_path / "made"), evil)
        place.relative_path, place.offset, place.length = "__9_9.distcp", 0, evil.stat().st_size
        shutil.copy(evil, folder / "__9_9.distcp")

    change_index(folder, put)
    with pytest.raises(ValueError, match=r"BytesStorageMetadata"):
        load_tensors(folder, tensors)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path", ["../x.distcp", "/etc/passwd", "__0_0.distcp/../../x", ""])
def test_parts_elsewhere(sharded, path):
    folder, tensors = sharded

    def put(index):
        next(iter(index.storage_data.values())).relative_path = path

    change_index(folder, put)
    with pytest.raises(ValueError, match="names the file"):
        load_tensors(folder, tensors)


def test_an_index_of_another_kind(sharded):
    folder, tensors = sharded
    for wrong in (b"", b"x", pickle.dumps(None), pickle.dumps({"a": 1}), pickle.dumps(pickle.loads)):
        (folder / ".metadata").write_bytes(wrong)
        with pytest.raises(ValueError, match="checkpoint-00000004 is not a complete checkpoint"):
            load_tensors(folder, tensors)
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="checkpoint-00000004 is not a complete checkpoint"):
        load_tensors(folder, tensors)


@pytest.fixture
def refused(tmp_path):
    """A function that resumes a run on what its folder of images is by then, and returns the message."""
    write_folder(tmp_path / "images")
    new_trainer(tmp_path / "run", images=load_folder(tmp_path / "images")).run(Quiet())

    def resume():
        with pytest.raises(ValueError, match=r"cannot resume .*its images had other names or sizes") as error:
            new_trainer(tmp_path / "run", images=load_folder(tmp_path / "images"), resume=True)
        return str(error.value)

    return resume


def test_images_that_have_changed_since_are_named(tmp_path, refused):
    new_trainer(tmp_path / "run", images=load_folder(tmp_path / "images"), resume=True)
    changed = load_folder(tmp_path / "images").pictures[0]
    name, size = f"{changed.parent.name}/{changed.name}", changed.stat().st_size
    content = changed.read_bytes()
    changed.write_bytes(content + b"\0")
    assert refused().endswith(f": {name!r} had {size} bytes and has {size + 1}")
    changed.write_bytes(content)
    changed.rename(changed.with_stem("other"))
    assert refused().endswith(f": {name!r} is gone, '{changed.parent.name}/other{changed.suffix}' is new")
    for number in range(5):
        shutil.copy(changed.with_stem("other"), changed.with_stem(f"other{number}"))
    assert refused().endswith("is new, 2 more")


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"dark": 1}', b'{"dark/0.png": {"a": []}}'])
def test_a_list_of_images_that_is_missing_or_damaged(tmp_path, refused, content):
    """The checkpoint still tells the classes."""
    (tmp_path / "run" / "pictures.json").unlink()
    if content is not None:
        (tmp_path / "run" / "pictures.json").write_bytes(content)
    changed = load_folder(tmp_path / "images").pictures[0]
    changed.rename(changed.with_stem("other"))
    assert f"class {changed.parent.name}, which had" in refused()
