"""What a run keeps in its folder: checkpoints whole or refused, its own files alone, one run at a time."""

import json
import resource
import time

import pytest
import torch
import torch.distributed as dist
from training_support import Quiet, new_trainer, small_images, start, stored

from convnext_fast.training.state import (
    TENSORS,
    find_checkpoint,
    load_facts,
    load_tensors,
    lock_folder,
    remove_temporary_files,
    save_sharded_state,
    save_state,
)


def test_a_folder_with_a_run_is_neither_overwritten_nor_resumed_with_other_options(tmp_path):
    new_trainer(tmp_path).run(Quiet())
    with pytest.raises(ValueError, match="already holds a run"):
        new_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"its options had other values: lr was 0.01 and is 0.02"):
        new_trainer(tmp_path, resume=True, lr=2e-2)
    with pytest.raises(ValueError, match="class dark, which had 12 and has 13"):
        new_trainer(tmp_path, resume=True, images=small_images(26))
    with pytest.raises(ValueError, match=r"its config had other values: drop_path_rate was 0.3 and is 0.2"):
        new_trainer(tmp_path, resume=True, drop_path=0.2)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    new_trainer(tmp_path).run(Quiet())
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"words"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            new_trainer(tmp_path, resume=True)
    torch.save({"step": 1}, path)
    with pytest.raises(ValueError, match="not a checkpoint of a training run"):
        new_trainer(tmp_path, resume=True)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_facts(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = new_trainer(tmp_path)
    trainer.run(Quiet())
    target = {"model": {"stem.0.weight": torch.empty(8, 1, 2, 3)}}
    with pytest.raises(ValueError, match=r"stem\.0\.weight has shape \(8, 1, 2, 2\): expected \(8, 1, 2, 3\)"):
        load_tensors(tmp_path / "checkpoint.pt", target)
    with pytest.raises(ValueError, match="lacks stem"):
        load_tensors(tmp_path / "checkpoint.pt", {"model": {"stem": torch.empty(1)}})


def test_the_later_of_two_checkpoints_left_by_a_kill_is_used(tmp_path):
    new_trainer(tmp_path).run(Quiet())
    facts = load_facts(tmp_path / "checkpoint.pt")
    for step, latest in ((4, "checkpoint.pt"), (8, "checkpoint-00000008")):
        folder = tmp_path / f"checkpoint-{step:08d}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(facts | {"step": step}))
        assert find_checkpoint(tmp_path).name == latest
    (tmp_path / "checkpoint.pt").unlink()
    assert find_checkpoint(tmp_path).name == "checkpoint-00000008"


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    trainer = new_trainer(tmp_path)
    trainer.run(Quiet())
    state = stored(tmp_path)
    tensors = {name: state.pop(name) for name in TENSORS}
    before = (tmp_path / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt|too large"):
            save_state(tmp_path, tensors, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoint.pt", "history.json", "model"}


def test_a_checkpoint_saved_by_an_error_does_not_block_the_record_of_its_epoch(tmp_path):
    """By the sharded kind, a folder for a step: the second is of the same step."""
    tensors = {name: {"w": torch.ones(3)} for name in TENSORS}
    facts = {"step": 5, "epoch": {}, "history": [], "scaler": {}, "identity": {}}
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        for history in ([], [{"epoch": 1}]):
            save_sharded_state(tmp_path, tensors, facts | {"history": history})
            assert load_facts(find_checkpoint(tmp_path))["history"] == history
        assert len(list(tmp_path.glob("checkpoint-*"))) == 1
        save_sharded_state(tmp_path, tensors, facts | {"step": 6})
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000006"]
    finally:
        dist.destroy_process_group()


def test_only_temporary_files_of_a_run_are_removed(tmp_path):
    ours = (
        ".checkpoint.pt.0a1b2c3d.tmp",
        ".history.json.00000000.tmp",
        ".pictures.json.00000000.tmp",
        ".model-00001-of-00002.safetensors.0a1b2c3d.tmp",
    )
    theirs = (".notes.tmp", ".checkpoint.pt.tmp", "model.tmp", ".precious.0a1b2c3d.tmp")
    for name in (*ours, *theirs):
        (tmp_path / name).write_text("x")
    for name in (".checkpoint-00000005.tmp", ".checkpoint-00000005-2.tmp", ".mine.tmp"):
        (tmp_path / name / "inside").mkdir(parents=True)
    remove_temporary_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, ".mine.tmp"}


def test_only_one_run_at_a_time_writes_to_a_folder(tmp_path):
    process = start(_hold_for_a_while, tmp_path)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another run is writing to"):
        new_trainer(tmp_path)
    process.kill()
    process.join()
    new_trainer(tmp_path)


def _hold_for_a_while(directory):
    lock = lock_folder(directory)
    (directory / "held").touch()
    time.sleep(60)
    lock.close()


def test_an_unwritable_folder_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # which stops root too, whom no permission does
    with pytest.raises(OSError, match="lock"):
        new_trainer(tmp_path / "run")
