"""Training in two and three processes on a CPU against one process on the joint batch, and from one number to another.

The processes get the environment that torchrun gives; test_training_torchrun.py goes through torchrun itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_support import (
    Quiet,
    assert_as_good_as,
    finish,
    new_trainer,
    plain,
    small_images,
    start_ranks,
    tiny_config,
)

from convnext_fast import ConvNext
from convnext_fast.training.distributed import process_group
from convnext_fast.training.optim import moments
from convnext_fast.training.state import ENTRIES, TENSORS, find_checkpoint, load_facts, load_tensors, save_sharded_state

CPU = torch.device("cpu")


def train(output, options, until=None, model=None):
    """In every process of a group: train, and have the first write the losses.

    The 13 images to evaluate on are more batches for the first process than for the last.
    """
    torch.set_num_threads(1)
    with process_group(CPU) as process:
        trainer = new_trainer(output, validation=small_images(13), model=model, process=process, **options)
        weight = trainer.model.stages[1].blocks[0].mlp.fc1.weight
        if options.get("strategy") == "fsdp" and process.world > 1:
            assert weight.to_local().numel() < weight.numel()
            assert trainer.ema.module.stem[0].weight.to_local().numel() < 32
        reporter = Quiet(until)
        try:
            trainer.run(reporter)
        except KeyboardInterrupt:
            assert reporter.until
        if process.rank == 0:
            path = output / f"losses-{reporter.first}.json"
            path.write_text(json.dumps(reporter.losses))


def losses(output):
    found = {}
    for path in output.glob("losses-*.json"):
        found |= {int(step): loss for step, loss in json.loads(path.read_text()).items()}
    return [found[step] for step in sorted(found)]


# Drop path draws in each process for itself; all else is the same for any number of them. The gradient is clipped
# in the first half of the steps alone: were it clipped in all or in none, AdamW would not answer to its scale.
OPTIONS = {"batch_size": 12, "drop_path": 0.0, "clip_grad": 1.5, "layer_decay": 0.9, "epochs": 3}


def new_model():
    """That of ``new_trainer``."""
    torch.manual_seed(0)
    return ConvNext(tiny_config(drop_path_rate=0.0))


def results(output, model=None):
    """Of a run that is done: its losses, the scores of each epoch, the exported tensors, and AdamW's first moments."""
    epochs = json.loads((output / "history.json").read_text())["epochs"]
    scores = [[epoch[key] for key in ("loss", "validation_loss", "accuracy")] for epoch in epochs]
    trainer = new_trainer(output, model=model, resume=True, **OPTIONS)
    of_adamw = {name: state["exp_avg"] for name, state in moments(trainer.optimizer).items()}
    tensors = load_file(output / "model" / "model.safetensors")
    return {"losses": torch.tensor(losses(output)), "scores": torch.tensor(scores), **tensors, **of_adamw}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    train(output, OPTIONS)
    return output


def train_plainly(output, options):
    train(output, options, model=plain(new_model(), torch.float32))


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Says whether a run, of however many processes, is as good as plain ones of one, two and three processes."""
    eager = []
    for world in (1, 2, 3):
        output = tmp_path_factory.mktemp("plain")
        assert finish(start_ranks(world, train_plainly, output, OPTIONS)) == [0] * world
        eager.append(results(output, plain(new_model(), torch.float32)))
    output = tmp_path_factory.mktemp("exact")
    train(output, OPTIONS, model=plain(new_model(), torch.float64))
    exact = results(output, plain(new_model(), torch.float64))
    return lambda output: assert_as_good_as(eager, results(output), exact)


def test_the_comparison_sees_one_percent_of_the_gradient(tmp_path, check, alone):
    check(alone)
    model = new_model()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 1.01 * gradient)
    train(tmp_path, OPTIONS, model=model)
    with pytest.raises(AssertionError, match="the plain runs"):
        check(tmp_path)


thorough = pytest.mark.thorough


@pytest.mark.parametrize(
    ("strategy", "world"),
    [("ddp", 2), *(pytest.param(*case, marks=thorough) for case in (("ddp", 3), ("fsdp", 2), ("fsdp", 3)))],
)
def test_several_processes_equal_one(tmp_path, check, strategy, world):
    assert finish(start_ranks(world, train, tmp_path, OPTIONS | {"strategy": strategy})) == [0] * world
    check(tmp_path)


@pytest.mark.parametrize(
    "parts",
    [
        [(3, "fsdp", 2), (2, "fsdp", 4)],
        pytest.param([(2, "fsdp", 2), (3, "fsdp", 3), (2, "ddp", 4), (2, "fsdp", 5)], marks=thorough),
    ],
    ids=["3-2-1", "2-3-2-2-1"],
)
def test_a_run_resumes_on_another_number_of_processes_and_with_another_strategy(tmp_path, check, parts):
    """Each part ends in step ``until``, some in the middle of an epoch; one process does the rest."""
    for world, strategy, until in parts:
        options = OPTIONS | {"strategy": strategy, "resume": True, "save_every": 1}
        assert finish(start_ranks(world, train, tmp_path, options, until)) == [0] * world
        kept = [path.name for path in tmp_path.glob("*checkpoint*")]
        assert kept == [f"checkpoint-{until - 1:08d}" if strategy == "fsdp" else "checkpoint.pt"]
    train(tmp_path, OPTIONS | {"resume": True})
    firsts = [0, *(until - 1 for _, _, until in parts)]
    assert sorted(path.name for path in tmp_path.glob("losses-*")) == [f"losses-{first}.json" for first in firsts]
    check(tmp_path)


def watch_drop_path(output, options, until=None):
    """Train; write which samples of which block this process dropped in each step: those that leave as they came."""
    torch.set_num_threads(1)
    dropped, reporter = [], Quiet(until)
    with process_group(CPU) as process:
        trainer = new_trainer(output, process=process, **options)
        for block in trainer.model.blocks():
            block.register_forward_hook(lambda _, x, y: dropped.append((x[0] == y).flatten(1).all(1).tolist()))
        with contextlib.suppress(KeyboardInterrupt):
            trainer.run(reporter)
    (output / f"dropped-{process.rank}-{reporter.first}.json").write_text(json.dumps(dropped))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=thorough)])
def test_each_process_drops_its_own_samples_and_a_resumed_run_the_same_ones(tmp_path, strategy):
    options = OPTIONS | {"drop_path": 0.6, "strategy": strategy, "save_every": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for output, until, resume in ((whole, None, False), (cut, 4, False), (cut, None, True)):
        ranks = start_ranks(2, watch_drop_path, output, options | {"resume": resume}, until)
        assert finish(ranks) == [0, 0]
    first, second = (json.loads((whole / f"dropped-{rank}-0.json").read_text()) for rank in range(2))
    assert 0.1 < torch.tensor(first).float().mean() < 0.5
    assert all(first[i : i + 3] != second[i : i + 3] for i in range(0, len(first), 3))
    for rank, expected in enumerate((first, second)):
        before, after = (json.loads((cut / f"dropped-{rank}-{step}.json").read_text()) for step in (0, 3))
        assert before[: 3 * 3] + after == expected
    files = [load_file(output / "model" / "model.safetensors") for output in (whole, cut)]
    assert all(torch.equal(files[1][name], value) for name, value in files[0].items())


def lose_a_process(output, options):
    """Train in a process of a group; write how the run ended."""
    try:
        train(output, options)
    except ConnectionError as error:
        (output / f"end-{os.environ['RANK']}").write_text(str(error))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=thorough)])
def test_a_process_that_dies_ends_the_others_and_one_resumes(tmp_path, strategy):
    options = OPTIONS | {"strategy": strategy, "save_every": 1}
    survivor, victim = start_ranks(2, lose_a_process, tmp_path, options | {"epochs": 3000})
    while not list(tmp_path.glob("checkpoint*")):
        time.sleep(0.01)
    victim.kill()
    assert finish([survivor]) == [0]
    assert "process 0 of 2 lost another process" in (tmp_path / "end-0").read_text()
    trainer = new_trainer(tmp_path, resume=True, validation=small_images(13), **OPTIONS | {"epochs": 3000})
    assert trainer.step > 0
    with pytest.raises(KeyboardInterrupt):
        trainer.run(Quiet(until=trainer.step + 1))


def meet_a_fault(output, kind, strategy):
    """Train where one process alone meets a fault; write what each of them says."""
    torch.set_num_threads(1)
    images = small_images()
    with process_group(CPU) as process:
        trainer = new_trainer(output, images=images, process=process, strategy=strategy, **OPTIONS)
        reporter = Quiet()
        if process.rank == 1:
            reporter.step = lambda step, loss, lr: spoil(step)

        def spoil(step):
            # Step 3 is the last of the second epoch: its batch is loaded after step 2, which saves nothing.
            if step == 2 and kind == "image":
                images.pictures[:] = [Path("nowhere.png")] * len(images)
            elif step == 2:
                trainer.model.head.fc.bias.data.fill_(math.nan)

        try:
            trainer.run(reporter)
        except ValueError as error:
            (output / f"said-{process.rank}").write_text(str(error))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=thorough)])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("image", "nowhere.png: "),
        ("weight", "the loss is nan at step 3 of 6, learning rate 8.54e-03, first in head.fc, "),
    ],
)
def test_an_error_in_one_process_ends_all_with_the_same_message_and_loses_nothing(tmp_path, kind, words, strategy):
    assert finish(start_ranks(2, meet_a_fault, tmp_path, kind, strategy)) == [0, 0]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert words in said[0]
    assert load_facts(find_checkpoint(tmp_path))["step"] == 3


def fill_the_disk(output):
    """Save a state in parts twice, the second time where files may not grow."""
    torch.set_num_threads(1)
    with process_group(CPU):
        facts = {name: {} for name in ENTRIES} | {"history": []}
        tensors = {name: {"weight": torch.randn(40_000)} for name in TENSORS}
        save_sharded_state(output, tensors, facts | {"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            save_sharded_state(output, tensors, facts | {"step": 2})
        except OSError as error:
            (output / f"said-{os.environ['RANK']}").write_text(str(error))


def test_a_full_disk_or_a_truncated_part_is_an_error_and_keeps_the_last_checkpoint(tmp_path):
    assert finish(start_ranks(2, fill_the_disk, tmp_path)) == [0, 0]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert all("cannot write" in text and "is the disk full?" in text for text in said)
    assert not list(tmp_path.glob(".*.tmp"))
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-00000001"
    assert load_facts(checkpoint)["step"] == 1
    tensors = {name: {"weight": torch.zeros(40_000)} for name in TENSORS}
    load_tensors(checkpoint, tensors)
    assert tensors["model"]["weight"].std() > 0.9
    for part in checkpoint.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        load_tensors(checkpoint, tensors)
    (checkpoint / "run.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_facts(checkpoint)


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=thorough), "float16"])
def test_parameters_gathered_in_16_bits_train_as_well_as_autocast(tmp_path, alone, dtype):
    options = OPTIONS | {"dtype": dtype}
    train(tmp_path / "one", options)
    assert finish(start_ranks(2, train, tmp_path / "two", options | {"strategy": "fsdp"})) == [0, 0]
    exact, one, two = (torch.tensor(losses(path)) for path in (alone, tmp_path / "one", tmp_path / "two"))
    assert 0 < (two - exact).norm() <= 2 * (one - exact).norm()
