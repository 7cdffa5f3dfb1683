"""A small model and small images to train it on, here or in processes that start at once."""

import dataclasses
import functools
import multiprocessing
import os
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import torch
from support import relative_error

from convnext_fast import ConvNext, ConvNextConfig
from convnext_fast.images.processor import ConvNextImageProcessor
from convnext_fast.training import ImageSet, Trainer, TrainingOptions
from convnext_fast.training.distributed import Process

ALONE = Process(0, 1, torch.device("cpu"))
OPTIONS = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "warmup_epochs": 1, "ema": 0.9, "seed": 3}


def tiny_config(**fields):
    sizes = {"num_channels": 1, "patch_size": 2, "num_stages": 2, "depths": (1, 2), "hidden_sizes": (8, 16)}
    return ConvNextConfig(**{**sizes, "image_size": 8, "num_labels": 2, "layer_scale_init_value": 0.5, **fields})


def small_images(count=24, side=8, classes=("dark", "light")):
    rng = np.random.default_rng(0)
    labels = [i % len(classes) for i in range(count)]
    images = [rng.integers(0, 100, (side, side), np.uint8) + np.uint8(100 * label) for label in labels]
    return ImageSet(images, labels, classes)


def processor(side=8):
    return ConvNextImageProcessor(size=side, crop_pct=1.0, image_mean=[0.5], image_std=[0.5])


def write_folder(folder, count=20):
    """The images as files, in a folder for each class."""
    images = small_images(count)
    for i, (array, label) in enumerate(zip(images.pictures, images.labels, strict=True)):
        path = folder / images.classes[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(array).save(path)
    return folder


class Quiet:
    """A reporter that keeps the losses, and stops the run before step ``until``."""

    def __init__(self, until=None):
        self.losses, self.warnings, self.until = {}, [], until

    def start(self, step, steps):
        self.first = step

    def step(self, step, loss, lr):
        self.losses[step] = loss
        if step + 1 == self.until:
            raise KeyboardInterrupt

    def epoch(self, record):
        pass

    def warn(self, text):
        self.warnings.append(text)


def new_trainer(output, *, images=None, validation=None, model=None, drop_path=0.3, process=ALONE, **options):
    """A run of the tiny model; ``options`` are those of `TrainingOptions` and of `Trainer`."""
    torch.manual_seed(0)
    model = model or ConvNext(tiny_config(drop_path_rate=drop_path))
    of_training = {field.name for field in dataclasses.fields(TrainingOptions)} & options.keys()
    chosen = TrainingOptions(**{**OPTIONS, **{name: options.pop(name) for name in of_training}})
    return Trainer(model, images or small_images(), validation, processor(), chosen, output, process=process, **options)


def plain(model, dtype):
    """The model as eager PyTorch computes it in ``dtype``."""
    model.fused = False
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(dtype),))
    return model.to(dtype)


def assert_as_good_as(eager, found, exact):
    """``found`` errs as little against float64's ``exact`` as the plain runs ``eager``.

    In root mean square over all results at most twice as much as the worst of them, and none more than twice their
    largest: AdamW blows up the rounding of the smallest gradients, and it is a matter of luck in which result and in
    which run that is seen.
    """

    def errors(run):
        assert run.keys() == exact.keys()
        return torch.tensor([relative_error(run[name], exact[name]) for name in exact])

    ours, theirs = errors(found), torch.stack([errors(run) for run in eager])
    worst = f"{list(exact)[ours.argmax()]} errs by {ours.max():.2e}, the plain runs by {theirs.max():.2e} at most"
    assert ours.max() <= 2 * theirs.max(), worst
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean(1).sqrt().max(), worst


def stored(directory):
    """What the checkpoint of a run holds."""
    return torch.load(Path(directory) / "checkpoint.pt", weights_only=True)


@functools.cache
def _forks():
    """A context whose processes are forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    modules = [
        "training_support",
        "convnext_fast.ops.operators",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
    ]
    context.set_forkserver_preload(modules)
    from multiprocessing import forkserver

    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def start(function, *arguments):
    """A process that calls a function of a module."""
    process = _forks().Process(target=function, args=arguments)
    process.start()
    return process


def start_ranks(world, function, *arguments):
    """``world`` processes that call a function under the environment that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(_rank, rank, world, port, function, arguments) for rank in range(world)]


def _rank(rank, world, port, function, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)


def finish(processes, timeout=120):
    """Wait for processes, and kill those that take longer; their exit codes."""
    for process in processes:
        process.join(timeout)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]
