"""What goes wrong while training: it is named or skipped by choice, and nothing that was done is lost."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from training_support import (
    Quiet,
    finish,
    new_trainer,
    processor,
    small_images,
    start,
    stored,
    tiny_config,
    write_folder,
)

from convnext_fast import ConvNext
from convnext_fast.training import evaluate
from convnext_fast.training.data import evaluation_loader
from convnext_fast.training.image_set import load_folder

# Killed


class Log(Quiet):
    """Writes each step's loss to a file at once, to the bit."""

    def __init__(self, path):
        super().__init__()
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(self, step, loss, lr):
        os.write(self.file, f"{step} {loss.hex()}\n".encode())


def train(output, log, epochs):
    """Everything that a checkpoint has to keep: moments, average, loss scale, warm-up, drop path, mixing."""
    torch.set_num_threads(1)
    options = {"epochs": epochs, "warmup_epochs": 4, "dtype": "float16", "save_every": 1, "resume": True}
    new_trainer(output, validation=small_images(10), **options).run(Log(log))


def outcome(output):
    """Weights, history without times, and the loss scale."""
    epochs = json.loads((output / "history.json").read_text())["epochs"]
    untimed = [{key: value for key, value in epoch.items() if key != "images_per_second"} for epoch in epochs]
    return load_file(output / "model" / "model.safetensors"), untimed, stored(output)["scaler"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.thorough)])
def test_a_run_killed_repeatedly_resumes_to_the_same_bits(tmp_path, kills):
    epochs = 12 if kills < 10 else 60
    process = start(train, tmp_path / "whole", tmp_path / "whole.log", epochs)
    while process.is_alive() and not count(tmp_path / "whole.log"):
        time.sleep(0.001)
    began = time.monotonic()
    assert finish([process]) == [0]
    whole = time.monotonic() - began
    rng, run, log, codes = random.Random(kills), tmp_path / "run", tmp_path / "run.log", []
    for kill in range(kills):
        process = start(train, run, log, epochs)
        lines = count(log) + rng.randint(1, 5)
        while process.is_alive() and count(log) < lines:
            pass
        if kill % 2:
            time.sleep(rng.uniform(0, whole / kills))
        else:
            before = files(run)
            while process.is_alive() and files(run) == before:
                pass
        process.kill()
        codes += finish([process])
    # One that was to be killed at a random moment may have been done by then.
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert codes.count(-signal.SIGKILL) >= 2 * kills // 3
    assert finish([start(train, run, log, epochs)]) == [0]
    expected = dict(line.split() for line in (tmp_path / "whole.log").read_text().splitlines())
    assert len(expected) == 3 * epochs
    seen = [tuple(line.split()) for line in log.read_text().splitlines()]
    assert dict(seen) == expected
    assert all(expected[step] == loss for step, loss in seen)
    (weights, history, scaler), (again, *rest) = outcome(tmp_path / "whole"), outcome(run)
    assert rest == [history, scaler]
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert not list(run.glob(".*.tmp"))


def files(run):
    """What changes as soon as a file of the run is written to."""
    entries = {}
    for path in run.iterdir():
        with contextlib.suppress(FileNotFoundError):
            entries[path.name] = path.stat().st_mtime_ns
    return entries


def count(log):
    return log.read_bytes().count(b"\n") if log.exists() else 0


class Murder(Quiet):
    """Kills the process that loads images once step 4 is done."""

    def step(self, step, loss, lr):
        super().step(step, loss, lr)
        if step == 4:
            os.kill(self.trainer.loader._iterator._workers[0].pid, signal.SIGKILL)


def lose_a_loader(output):
    """Write what was said, and the losses until then and after resuming."""
    torch.set_num_threads(1)
    options = {"epochs": 4, "batch_size": 4, "workers": 1, "save_every": 1}
    reporter, rest = Murder(), Quiet()
    reporter.trainer = new_trainer(output, **options)
    try:
        reporter.trainer.run(reporter)
    except ChildProcessError as error:
        said = str(error)
    new_trainer(output, **options, resume=True).run(rest)
    (output / "losses.json").write_text(json.dumps([said, rest.first, reporter.losses, rest.losses]))


def test_a_dead_loader_process_is_reported_and_nothing_is_lost(tmp_path):
    assert finish([start(lose_a_loader, tmp_path)]) == [0]
    said, first, before, after = json.loads((tmp_path / "losses.json").read_text())
    assert said.startswith("a process that loads images died; it may have run out of memory")
    assert first == max(map(int, before)) + 1 or first == max(map(int, before))
    whole, threads = Quiet(), torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process, for sums depend on it
    try:
        new_trainer(tmp_path / "whole", epochs=4, batch_size=4).run(whole)
    finally:
        torch.set_num_threads(threads)
    assert {int(step): loss for step, loss in (before | after).items()} == pytest.approx(whole.losses, rel=1e-6)


# A loss or a gradient that is no number


class Spoil(Quiet):
    """Puts a value into a parameter after a step."""

    def __init__(self, step, parameter, value=math.nan):
        super().__init__()
        self.at, self.parameter, self.value = step, parameter, value

    def step(self, step, loss, lr):
        super().step(step, loss, lr)
        if step == self.at:
            self.kept = self.parameter.detach().clone()
            self.parameter.data.view(-1)[0] = self.value

    def warn(self, text):
        super().warn(text)
        self.parameter.data.copy_(self.kept)


LAYERS = [
    ("stem.0.weight", "stem, whose 0.weight is not finite"),
    ("stages.1.downsample.0.weight", r"stages\.1\.downsample, whose 0\.weight is not finite"),
    ("stages.1.blocks.1.mlp.fc1.bias", r"stages\.1\.blocks\.1, whose mlp\.fc1\.bias is not finite"),
    ("head.norm.bias", r"head\.norm, whose bias is not finite"),
    ("head.fc.bias", r"head\.fc, whose bias is not finite"),
]


@pytest.mark.parametrize(("name", "where"), LAYERS)
def test_a_nan_loss_names_the_step_and_the_first_bad_layer(tmp_path, name, where):
    trainer = new_trainer(tmp_path)
    reporter = Spoil(3, trainer.model.get_parameter(name))
    with pytest.raises(ValueError, match=f"the loss is nan at step 4 of 6, learning rate .*, first in {where}"):
        trainer.run(reporter)
    # The four good steps were saved by the end of the first epoch and when the run stopped.
    assert stored(tmp_path)["step"] == 4


def test_a_layer_that_overflows_is_distinguished_from_one_with_bad_weights(tmp_path):
    trainer = new_trainer(tmp_path)
    mlp = trainer.model.stages[1].blocks[0].mlp
    with torch.no_grad():
        mlp.fc1.bias.fill_(1e30)
        mlp.fc2.weight.fill_(1e30)
    with pytest.raises(ValueError, match=r"at step 0 of 6.*first in stages\.1\.blocks\.0, whose input was finite"):
        trainer.run(Quiet())
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_nonfinite_step_can_be_skipped(tmp_path):
    """What the step leaves behind is what was there before; its loss is in no mean."""
    trainer = new_trainer(tmp_path, skip_nonfinite=True, validation=small_images(10))
    reporter = Spoil(1, trainer.model.get_parameter("head.fc.bias"))
    history = trainer.run(reporter)
    assert [math.isnan(loss) for loss in reporter.losses.values()] == [False, False, True, False, False, False]
    (warning,) = reporter.warnings
    assert "skipped a step: the loss is nan at step 2 of 6" in warning
    assert "first in head.fc" in warning
    assert history[0]["skipped_steps"] == 1
    assert history[0]["loss"] == pytest.approx((reporter.losses[0] + reporter.losses[1]) / 2)
    assert "skipped_steps" not in history[1]
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert all(torch.isfinite(value).all() for value in trainer.result.state_dict().values())


def test_bad_weights_end_the_run_even_if_steps_are_skipped(tmp_path):
    model = ConvNext(tiny_config())
    with torch.no_grad():
        model.head.fc.bias[0] = math.nan
    with pytest.raises(ValueError, match="every step of epoch 1 was skipped"):
        new_trainer(tmp_path, model=model, skip_nonfinite=True).run(Quiet())


@pytest.mark.parametrize("skip", [False, True])
def test_a_nan_gradient_reaches_no_weight(tmp_path, skip):
    """Here it overflows on its way to the last layer."""
    trainer = new_trainer(tmp_path, skip_nonfinite=skip)
    weight = trainer.model.head.fc.weight
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    handle = weight.register_hook(lambda gradient: gradient * math.inf)
    message = r"the norm of the gradient is (nan|inf) at step 0 of 6.*first in head\.fc\.weight"

    class Once(Quiet):
        def warn(self, text):
            super().warn(text)
            handle.remove()

    reporter = Once()
    if not skip:
        with pytest.raises(ValueError, match=message):
            trainer.run(reporter)
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        return
    trainer.run(reporter)
    assert len(reporter.warnings) == 1
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


# Images


@pytest.fixture
def images(tmp_path):
    folder = write_folder(tmp_path / "data")
    broken = folder / "dark" / "0.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    (folder / "light" / "1.png").write_bytes(b"")
    return load_folder(folder)


def test_an_image_that_cannot_be_read_is_named_and_the_steps_before_it_are_saved(images, tmp_path):
    trainer = new_trainer(tmp_path / "run", images=images, batch_size=2)
    with pytest.raises(ValueError, match=r"(dark/0|light/1)\.png: (broken image|the file is empty)"):
        trainer.run(Quiet())
    assert trainer.step > 0
    assert stored(tmp_path / "run")["step"] == trainer.step
    loader = evaluation_loader(images, processor(), channels=1, batch_size=4)
    with pytest.raises(ValueError, match=r"dark/0\.png: broken image"):
        evaluate(ConvNext(tiny_config()), loader, torch.device("cpu"))
    # The run goes on with the choice to skip, which is not one of what is computed.
    reporter = Quiet()
    new_trainer(tmp_path / "run", images=images, batch_size=2, resume=True, skip_unreadable=True).run(reporter)
    assert reporter.first == trainer.step
    assert len(reporter.losses) == 20 - trainer.step


def test_an_unreadable_image_can_be_replaced(images, tmp_path):
    reporter = Quiet()
    trainer = new_trainer(tmp_path / "run", images=images, skip_unreadable=True, epochs=4, validation=images)
    history = trainer.run(reporter)
    assert sum("dark/0.png: broken image" in text for text in reporter.warnings) >= 1
    skipped = [text for text in reporter.warnings if text.startswith("skipped")]
    assert sorted(text.partition(": ")[0].rpartition("/data/")[2] for text in skipped) == ["dark/0.png", "light/1.png"]
    assert history[0]["accuracy"] * 18 == pytest.approx(round(history[0]["accuracy"] * 18))
    sampler = trainer.sampler
    sampler.epoch = sampler.first = 0
    (bad,) = [i for i, path in enumerate(images.pictures) if path.name == "0.png"]
    for batch, keys in zip(trainer.loader, sampler, strict=True):
        assert len(batch.pixels) == len(keys) == 8
        assert any("dark/0.png" in text for text in batch.unreadable) == (bad in [key.index for key in keys])


def test_a_run_ends_if_no_image_can_be_read(images, tmp_path):
    for path in images.pictures:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image can be read; the first: .*the file is empty"):
        new_trainer(tmp_path / "run", images=images, skip_unreadable=True).run(Quiet())
    loader = evaluation_loader(images, processor(), channels=1, batch_size=4, skip_unreadable=True)
    with pytest.raises(ValueError, match="none of the images to evaluate on can be read"):
        evaluate(ConvNext(tiny_config()), loader, torch.device("cpu"))


@pytest.mark.parametrize("skip", [False, True])
def test_a_gradient_that_no_loss_scale_makes_finite_ends_a_float16_run(tmp_path, skip):
    trainer = new_trainer(tmp_path, dtype="float16", epochs=20, skip_nonfinite=skip)
    trainer.model.head.fc.bias.register_hook(lambda gradient: gradient * math.nan)
    reporter = Quiet()
    message = (
        "every step of epoch .* was skipped" if skip else r"the norm of the gradient is nan at step .*head\.fc\.bias"
    )
    with pytest.raises(ValueError, match=message):
        trainer.run(reporter)
    assert len(reporter.losses) >= 16  # the scale begins at 2^16, and is halved first
