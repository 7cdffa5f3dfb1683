"""The training loop: steps, evaluation, checkpoints that resume to the same numbers, and the exported model.

A run is a function of its options, pictures and first weights. Step s draws its random numbers from (seed, s, rank)
and its batch from (seed, epoch, place in it), so a checkpoint holds weights, moments, average and the step alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..checkpoint_files import json_writer, write_files
from ..image_processor import ConvNextImageProcessor
from ..model import ConvNext
from .data import EpochSampler, ImageSet, evaluation_loader, training_loader
from .distributed import Process, sum_over_processes, wait_for_all
from .ema import Ema
from .optim import build_optimizer, learning_rate, set_learning_rate
from .options import TrainingOptions
from .state import CHECKPOINT, load_state, save_state

HISTORY = "history.json"
MODEL = "model"


class Score(NamedTuple):
    """Of an evaluation: mean cross-entropy, and the part of the pictures that were recognised."""

    loss: float
    accuracy: float


class Reporter(Protocol):
    """What a run tells about its progress."""

    def start(self, step: int, steps: int) -> None:
        """Training begins at ``step`` of ``steps``."""

    def step(self, step: int, loss: float, lr: float) -> None:
        """Step number ``step``, from 0, is done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done; ``record`` is its entry in the history."""


class Trainer:
    """One training run.

    Args:
        model: on the device of ``process``.
        training, validation: pictures; None for no evaluation.
        processor: makes pictures into input.
        options: see `TrainingOptions`.
        output: the folder of the run: ``checkpoint.pt``, ``history.json``, and in the end ``model/``.
        process: this process.
        resume: go on from the folder's checkpoint where it has one.
        save_every: steps between checkpoints; 0 for one at the end of each epoch.
        workers: processes that load pictures, for each training process.

    Raises:
        ValueError: the pictures, model and options do not fit together; the folder holds a run and ``resume`` is
            false; or its run had other options.
    """

    def __init__(
        self,
        model: ConvNext,
        training: ImageSet,
        validation: ImageSet | None,
        processor: ConvNextImageProcessor,
        options: TrainingOptions,
        output: str | Path,
        *,
        process: Process,
        resume: bool = False,
        save_every: int = 0,
        workers: int = 0,
    ):
        if model.num_classes != len(training.classes):
            raise ValueError(f"the model has {model.num_classes} classes, the pictures {len(training.classes)}")
        self.model, self.processor, self.options, self.process = model, processor, options, process
        self.output, self.save_every = Path(output), save_every
        self.sampler = EpochSampler(len(training), options.batch_size, options.seed, process.rank, process.world)
        common = {"channels": model.config.num_channels, "workers": workers}
        common["pin_memory"] = process.device.type == "cuda"
        self.loader = training_loader(
            training,
            processor,
            self.sampler,
            augmentation=options.augmentation,
            mixup=options.mixup,
            cutmix=options.cutmix,
            **common,
        )
        self.validation = None
        if validation is not None:
            self.validation = evaluation_loader(
                validation,
                processor,
                batch_size=options.batch_size // process.world,
                rank=process.rank,
                world=process.world,
                **common,
            )
        self.optimizer = build_optimizer(model, options)
        self.ema = Ema(model, options.ema) if options.ema else None
        self.step, self.epoch_loss, self.history = 0, 0.0, []
        self._identity = {
            "options": dataclasses.asdict(options) | {"betas": list(options.betas)},
            "config": json.dumps(model.config.to_dict(), sort_keys=True),
            "pictures": [len(training), *training.classes],
        }
        self.output.mkdir(parents=True, exist_ok=True)
        if (self.output / CHECKPOINT).exists():
            if not resume:
                raise ValueError(f"{self.output} holds a run already: resume it, or write to another folder")
            self._restore()
        wait_for_all()

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.options.epochs * len(self.sampler)

    @property
    def result(self) -> ConvNext:
        """The model that is evaluated and exported: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def run(self, reporter: Reporter) -> list[dict[str, Any]]:
        """Train to the end, export to ``output/model``, and return the history, a record for each epoch.

        Raises:
            ValueError: a picture cannot be read, or the loss is no number; checkpoints written so far remain.
        """
        model: nn.Module = self.model
        if self.process.world > 1:
            device = self.process.device
            model = DistributedDataParallel(
                self.model, device_ids=None if device.type == "cpu" else [device], gradient_as_bucket_view=True
            )
        reporter.start(self.step, self.steps)
        per_epoch = len(self.sampler)
        while self.step < self.steps:
            epoch = self.sampler.epoch = self.step // per_epoch
            self.sampler.first = self.step % per_epoch
            self.model.train()
            started, first = time.perf_counter(), self.step
            for batch in self.loader:
                if isinstance(batch, ValueError):
                    raise batch
                loss, lr = self._train_step(model, *batch)
                reporter.step(self.step, loss, lr)
                self.epoch_loss += loss
                self.step += 1
                if self.save_every and self.step % self.save_every == 0 and self.step % per_epoch:
                    self._save()
            seconds = time.perf_counter() - started
            self._finish_epoch(epoch, lr, (self.step - first) * self.options.batch_size / seconds, reporter)
        self.export(self.output / MODEL)
        return self.history

    def _train_step(self, model: nn.Module, pixels: Tensor, targets: Tensor) -> tuple[float, float]:
        """One optimiser step; the loss before it, of all processes, and its learning rate."""
        options, device = self.options, self.process.device
        key = np.random.SeedSequence([options.seed, self.step, self.process.rank])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        lr = learning_rate(self.step, len(self.sampler), options)
        set_learning_rate(self.optimizer.param_groups, lr)
        pixels = pixels.to(device, non_blocking=True, memory_format=torch.channels_last)
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            logits = model(pixels)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=options.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        value = float(sum_over_processes(loss.detach().clone()) / self.process.world)
        if not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} at step {self.step} of {self.steps}, learning rate {lr:.2e}: "
                "lower the learning rate, or clip the gradient"
            )
        if options.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_grad)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.model, self.step)
        return value, lr

    def _finish_epoch(self, epoch: int, lr: float, speed: float, reporter: Reporter) -> None:
        record = {"epoch": epoch + 1, "step": self.step, "lr": lr, "images_per_second": round(speed, 1)}
        record["loss"] = self.epoch_loss / len(self.sampler)
        if self.validation is not None:
            score = evaluate(self.result, self.validation, self.process.device, self.options.bf16)
            record |= {"validation_loss": score.loss, "accuracy": score.accuracy}
        self.epoch_loss = 0.0
        self.history.append(record)
        self._save()
        reporter.epoch(record)

    def export(self, directory: Path) -> None:
        """Write the model in transformers' layout, with ``preprocessor_config.json``; the first process does it."""
        if self.process.rank == 0:
            self.result.save_pretrained(directory, format="transformers")
            self.processor.save_pretrained(directory)
        wait_for_all()

    def _save(self) -> None:
        if self.process.rank == 0:
            state = {
                "step": self.step,
                "model": self.model.state_dict(),
                "model_ema": self.ema.module.state_dict() if self.ema else {},
                "optimizer": self.optimizer.state_dict(),
                "epoch_loss": self.epoch_loss,
                "history": self.history,
                "identity": self._identity,
            }
            save_state(self.output, state)
            write_files(self.output, {HISTORY: json_writer({"epochs": self.history})})
        wait_for_all()

    def _restore(self) -> None:
        state = load_state(self.output)
        for name, value in self._identity.items():
            before = state["identity"][name]
            if before != value:
                raise ValueError(f"cannot resume {self.output}: {_difference(name, before, value)}")
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["model_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch_loss, self.history = state["step"], state["epoch_loss"], state["history"]


@torch.no_grad()
def evaluate(model: ConvNext, loader: DataLoader, device: torch.device, bf16: bool = False) -> Score:
    """The score of ``model`` over the pictures of all processes' loaders; sets evaluation mode.

    Raises:
        ValueError: a picture cannot be read.
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        pixels = batch.pixels.to(device, memory_format=torch.channels_last)
        labels = batch.targets.argmax(1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(pixels).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        totals += torch.stack([loss.double(), right.double(), totals.new_tensor(len(labels))])
    loss, right, count = sum_over_processes(totals).tolist()
    return Score(loss / count, right / count)


def _difference(name: str, before: Any, now: Any) -> str:
    """What changed between two runs, in words."""
    if isinstance(before, dict):
        changed = [key for key in now if before.get(key) != now[key]]
        return f"{name} differ: " + ", ".join(f"{key} was {before.get(key)} and is {now[key]}" for key in changed)
    return f"its {name} differ from this run's"
