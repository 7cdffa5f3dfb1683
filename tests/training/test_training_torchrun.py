"""The command under torchrun: it trains what one process does, and starts again where a process was lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from training_support import ALONE, Quiet, assert_as_good_as, finish, plain, start_ranks, tiny_config, write_folder

from convnext_fast import ConvNext, cli
from convnext_fast.training import Trainer, TrainingOptions
from convnext_fast.training.command import Start, build
from convnext_fast.training.data import load_data
from convnext_fast.training.distributed import process_group, sum_over_processes


def join_late(output, port):
    """Join over a store that outlives its processes, as torchrun's does; the first process comes last."""
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if os.environ["RANK"] == "0":
        time.sleep(1)
    with process_group(torch.device("cpu")) as process:
        value = sum_over_processes(torch.tensor(2.0**process.rank))
        (output / f"sum-{process.rank}").write_text(str(value.item()))


def test_restarted_processes_do_not_wait_for_ended_ones(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for world in (3, 3, 2):
        assert finish(start_ranks(world, join_late, tmp_path, store.port)) == [0] * world
        sums = [tmp_path / f"sum-{rank}" for rank in range(world)]
        assert [float(path.read_text()) for path in sums] == [2**world - 1] * world
        for path in sums:
            path.unlink()


CHOSEN = {"batch_size": 8, "warmup_epochs": 1, "lr": 1e-2, "clip_grad": 1.0, "ema": 0.9}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    tiny_config(num_channels=3).save_pretrained(folder / "config")
    data = write_folder(folder / "data")
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in CHOSEN.items()]
    return ["train", str(data), "--config", str(folder / "config"), "--device=cpu", *arguments]


def torchrun(command, output, *arguments):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    return subprocess.Popen(
        [*launcher, "-m", "convnext_fast", *command, "--output", str(output), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def plain_run(command, output, dtype):
    """What the command does, on the plain model."""
    options = TrainingOptions(**CHOSEN, epochs=2)
    training, validation = load_data(command[1], 0.1, options.seed)
    torch.manual_seed(options.seed)
    model, processor = build(Start(config=command[3]), training.classes, options, None, digits=False)
    Trainer(plain(model, dtype), training, validation, processor, options, output, process=ALONE).run(Quiet())
    return load_file(output / "model" / "model.safetensors")


def test_the_command_under_torchrun_gives_the_model_of_one_process(command, tmp_path):
    run = torchrun(command, tmp_path / "two", "--epochs", "2")
    eager, exact = (plain_run(command, tmp_path / str(dtype), dtype) for dtype in (torch.float32, torch.float64))
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert "2 processes on cpu" in out
    assert out.count("epoch 1 ") == 1
    assert cli.main([*command, "--epochs", "2", "--output", str(tmp_path / "one")]) == 0
    for name in ("one", "two"):
        assert_as_good_as([eager], load_file(tmp_path / name / "model" / "model.safetensors"), exact)
    assert ConvNext.from_pretrained(tmp_path / "two" / "model").config.id2label == {0: "dark", 1: "light"}


@pytest.mark.thorough
def test_torchrun_restarts_a_run_that_lost_a_process(command, tmp_path):
    run = torchrun(command, tmp_path, "--epochs", "15", "--strategy", "fsdp", "--save-every", "1", "--resume")
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("checkpoint-*"))) == 0:
            assert run.poll() is None, run.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (first, _) = children(run.pid)
        os.kill(first, signal.SIGKILL)
        out, err = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 0, err
    assert "exitcode: -9" in err
    assert "resumed at step" in out
    epochs = json.loads((tmp_path / "history.json").read_text())["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, 16))


def children(pid):
    """The processes that a process has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
