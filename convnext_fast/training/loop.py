"""The training loop: steps, evaluation, checkpoints that resume to the same numbers, and the exported model.

A run is a function of its options, images and initial weights. Step s draws its random numbers from (seed, s, rank)
and its batch from (seed, epoch, place in it), so a checkpoint holds only weights, moments, average, loss scale and the
step. Only drop path depends on the number of processes, because each draws its own samples.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..files import json_writer, write_files
from ..images.processor import ConvNextImageProcessor
from ..models.convnext import ConvNext
from . import distributed, state
from .data import Batch, EpochSampler, batches, dead_worker, evaluation_loader, training_loader
from .distributed import STRATEGIES, Process
from .ema import Ema
from .evaluation import Reporter, autocast, evaluate
from .faults import bad_gradients, first_bad_layer
from .image_set import FILES, ImageSet, changed_files
from .optim import learning_rate, moments, parameter_groups, set_learning_rate
from .options import TrainingOptions

MODEL = "model"


class Trainer:
    """One training run.

    Args:
        model: on the device of ``process``.
        training, validation: the images; None for no evaluation.
        processor: turns them into the model's input.
        options: see `TrainingOptions`.
        output: the run's folder: the checkpoint (see `state`), ``history.json``, ``pictures.json`` (names and sizes of
            the image files), and at the end ``model/``. All processes, on all machines, must see the same folder.
        process: this process.
        strategy: with several processes, "ddp": each holds the whole model (DistributedDataParallel); or "fsdp":
            parameters, gradients, moments and average are split over them (FSDP2).
        resume: continue from the folder's checkpoint, if there is one.
        save_every: steps between checkpoints; 0 for one at the end of each epoch.
        workers: processes that load images, for each training process.
        skip_unreadable: instead of stopping, replace an unreadable training image by the next one, and leave an
            unreadable evaluation image out.
        skip_nonfinite: skip a step whose loss or gradient is NaN or infinite, instead of stopping.

    Raises:
        ValueError: images, model and options do not match; or the folder holds a run, and ``resume`` is false or that
            run had other options.
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
        strategy: str = "ddp",
        resume: bool = False,
        save_every: int = 0,
        workers: int = 0,
        skip_unreadable: bool = False,
        skip_nonfinite: bool = False,
    ):
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy is {strategy!r}: expected one of {', '.join(STRATEGIES)}")
        if model.num_classes != len(training.classes):
            raise ValueError(f"the model has {model.num_classes} classes, the images {len(training.classes)}")
        self.model, self.processor, self.options, self.process = model, processor, options, process
        self.output, self.save_every, self.skip_nonfinite = Path(output), save_every, skip_nonfinite
        self.dtype = getattr(torch, options.dtype)
        self.sampler = EpochSampler(len(training), options.batch_size, options.seed, process.rank, process.world)
        common = {"channels": model.config.num_channels, "workers": workers, "skip_unreadable": skip_unreadable}
        common["pin_memory"] = process.device.type == "cuda"
        random = {name: getattr(options, name) for name in ("augmentation", "mixup", "cutmix")}
        self.loader = training_loader(training, processor, self.sampler, **random, **common)
        self.validation = None
        if validation is not None:
            part = {"batch_size": options.batch_size // process.world, "rank": process.rank, "world": process.world}
            self.validation = evaluation_loader(validation, processor, **part, **common)
        self.ema = Ema(model, options.ema) if options.ema else None
        self.sharded = strategy == "fsdp" and process.world > 1
        if self.sharded:
            self._skeleton = copy.deepcopy(model).to("meta")
            for part in (model, self.ema.module) if self.ema else (model,):
                distributed.shard(part, process, self.dtype)
        groups = parameter_groups(model, options.weight_decay, options.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=self.dtype == torch.float16)
        self.step, self.history = 0, []
        self.epoch = {"loss": 0.0, "skipped": 0}
        self._warned: set[str] = set()
        self._training = training
        self._identity = {
            "options": dataclasses.asdict(options) | {"betas": list(options.betas)},
            "config": json.dumps(model.config.to_dict(), sort_keys=True),
            "pictures": training.fingerprint(),
        }
        self.output.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock_output()
        checkpoint = state.find_checkpoint(self.output)
        if checkpoint is not None:
            if not resume:
                raise ValueError(f"{self.output} already holds a run: resume it, or choose another folder")
            self._restore(checkpoint)
        elif process.rank == 0 and (files := training.files()):
            with contextlib.suppress(OSError):  # only a message needs it, and a full disk shows at the first checkpoint
                write_files(self.output, {FILES: json_writer(files)})
        self.saved = self.step
        distributed.barrier()
        if process.rank == 0:
            state.remove_temporary_files(self.output)
            state.remove_temporary_files(self.output / MODEL)
        distributed.barrier()

    def _lock_output(self) -> IO[str] | None:
        """Lock the folder in the first process; all raise if it cannot."""
        lock = fault = None
        try:
            lock = state.lock_folder(self.output) if self.process.rank == 0 else None
        except (OSError, ValueError) as error:
            fault = error
        distributed.raise_on_all(fault, self.process.device)
        return lock

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
            ChildProcessError: a process that loads images died.
            ValueError: an image cannot be read, or the loss or gradient is NaN or infinite.

        Everything up to the step that failed has been saved.
        """
        model: nn.Module = self.model
        if self.process.world > 1 and not self.sharded:
            device = self.process.device
            model = DistributedDataParallel(
                self.model, device_ids=None if device.type == "cpu" else [device], gradient_as_bucket_view=True
            )
        reporter.start(self.step, self.steps)
        while len(self.history) < self.options.epochs:
            with self._saving_on_errors():
                self._train_epoch(model, reporter)
        self.export(self.output / MODEL)
        return self.history

    @contextlib.contextmanager
    def _saving_on_errors(self) -> Iterator[None]:
        """Save the finished steps before an error, which all processes raise together, ends the run."""
        try:
            yield
        except (ValueError, ChildProcessError):
            if self.step > self.saved:
                self._save()
            raise
        except RuntimeError as error:
            # A loader process may die in the middle of a step; the half step is not saved.
            raise dead_worker(error) or error from error

    def _train_epoch(self, model: nn.Module, reporter: Reporter) -> None:
        """Run the remaining steps of the epoch (there may be none), then add its record."""
        epoch, per_epoch = len(self.history), len(self.sampler)
        self.sampler.epoch, self.sampler.first = epoch, self.step - epoch * per_epoch
        self.model.train()
        started, first = time.perf_counter(), self.step
        for batch in batches(self.loader):
            pixels, targets = self._checked(batch, reporter)
            reporter.step(self.step, *self._train_step(model, pixels, targets, reporter))
            self.step += 1
            if self.save_every and self.step % self.save_every == 0 and self.step % per_epoch:
                self._save()
        seconds = time.perf_counter() - started
        self._finish_epoch((self.step - first) * self.options.batch_size / seconds, reporter)

    def _checked(self, batch: Batch | Exception, reporter: Reporter) -> tuple[Tensor, Tensor]:
        """The batch, if no process has an error instead."""
        distributed.raise_on_all(batch if isinstance(batch, Exception) else None, self.process.device)
        for text in batch.unreadable:
            if text not in self._warned:
                self._warned.add(text)
                reporter.warn(f"skipped {text}")
        return batch.pixels, batch.targets

    def _train_step(self, model: nn.Module, pixels: Tensor, targets: Tensor, reporter: Reporter) -> tuple[float, float]:
        """One optimiser step; the loss before it, of all processes, and its learning rate."""
        options, device = self.options, self.process.device
        self._seed()
        lr = learning_rate(self.step, len(self.sampler), options)
        set_learning_rate(self.optimizer.param_groups, lr)
        pixels = pixels.to(device, non_blocking=True, memory_format=torch.channels_last)
        targets = targets.to(device, non_blocking=True)
        with autocast(device, self.dtype):
            logits = model(pixels)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=options.label_smoothing)
        value = float(distributed.sum_over_processes(loss.detach().clone()) / self.process.world)
        if not math.isfinite(value):
            self._skip_or_raise(f"the loss is {value}", self._first_bad_layer(model, pixels), lr, reporter)
            return value, lr
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        norm = norm.full_tensor() if self.sharded else norm
        # In float16 the scaler handles a gradient that overflows: it skips the step and lowers the scale. At a scale
        # below 1 it is not an overflow.
        scaling = self.scaler.is_enabled()
        if not math.isfinite(norm) and not (scaling and self.scaler.get_scale() >= 1.0):
            names = dict.fromkeys(
                name for names in distributed.from_all_processes(bad_gradients(self.model)) for name in names
            )
            self._skip_or_raise(f"the norm of the gradient is {float(norm)}", ", ".join(names), lr, reporter)
            if scaling:
                self.scaler.update()
            return value, lr
        if options.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, options.clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.epoch["loss"] += value
        if self.ema:
            self.ema.update(self.model, self.step)
        return value, lr

    def _seed(self) -> None:
        """Start this step's random numbers."""
        key = np.random.SeedSequence([self.options.seed, self.step, self.process.rank])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))

    def _first_bad_layer(self, model: nn.Module, pixels: Tensor) -> str:
        """The first layer of any process with a NaN or infinite output for this step's batch."""
        self._seed()
        with autocast(self.process.device, self.dtype):
            mine = first_bad_layer(self.model, model, pixels)
        found = [bad for bad in distributed.from_all_processes(mine) if bad is not None]
        return min(found)[1] if found else "the loss itself, for every layer's output is finite"

    def _skip_or_raise(self, what: str, where: str, lr: float, reporter: Reporter) -> None:
        text = f"{what} at step {self.step} of {self.steps}, learning rate {lr:.2e}, first in {where}"
        if not self.skip_nonfinite:
            raise ValueError(f"{text}: lower the learning rate, clip the gradient, or skip such steps")
        self.epoch["skipped"] += 1
        reporter.warn(f"skipped a step: {text}")

    def _finish_epoch(self, speed: float, reporter: Reporter) -> None:
        epoch, done = len(self.history), len(self.sampler) - self.epoch["skipped"]
        if not done:
            raise ValueError(f"every step of epoch {epoch + 1} was skipped: the weights no longer change")
        lr = learning_rate(self.step - 1, len(self.sampler), self.options)
        record = {"epoch": epoch + 1, "step": self.step, "lr": lr, "images_per_second": round(speed, 1)}
        record["loss"] = self.epoch["loss"] / done
        if self.epoch["skipped"]:
            record["skipped_steps"] = self.epoch["skipped"]
        if self.validation is not None:
            score = evaluate(self.result, self.validation, self.process.device, self.dtype, reporter)
            record |= {"validation_loss": score.loss, "accuracy": score.accuracy}
        self.epoch = {"loss": 0.0, "skipped": 0}
        self.history.append(record)
        self._save()
        reporter.epoch(record)

    def export(self, directory: Path) -> None:
        """Write the model in transformers' format, with ``preprocessor_config.json``, from the first process."""
        result = self.result
        if self.sharded:
            tensors = {name: tensor.full_tensor().cpu() for name, tensor in result.state_dict().items()}
            result = self._skeleton
            result.load_state_dict(tensors, assign=True)
        if self.process.rank == 0:
            # A run killed right after its last checkpoint lacks that checkpoint's history.
            write_files(self.output, {state.HISTORY: json_writer({"epochs": self.history})})
            result.save_pretrained(directory, format="transformers")
            self.processor.save_pretrained(directory)
        distributed.barrier()

    def _tensors(self) -> dict[str, Any]:
        return {
            "model": dict(self.model.state_dict()),
            "model_ema": dict(self.ema.module.state_dict()) if self.ema else {},
            "optimizer": moments(self.optimizer),
        }

    def _save(self) -> None:
        facts = {"step": self.step, "epoch": self.epoch, "history": self.history, "identity": self._identity}
        facts["scaler"] = self.scaler.state_dict()
        if self.sharded:
            state.save_sharded_state(self.output, self._tensors(), facts)
        elif self.process.rank == 0:
            state.save_state(self.output, self._tensors(), facts)
        self.saved = self.step
        distributed.barrier()

    def _restore(self, checkpoint: Path) -> None:
        facts = state.load_facts(checkpoint)
        for name, value in self._identity.items():
            before = facts["identity"].get(name)
            if before != value:
                words = _difference(name, before, value)
                files = changed_files(self.output, self._training.files()) if name == "pictures" else ""
                raise ValueError(f"cannot resume {self.output}: {words}{files and f': {files}'}")
        self._check(checkpoint, facts)
        state.load_tensors(checkpoint, self._tensors())
        self.scaler.load_state_dict(facts["scaler"])
        self.step, self.epoch, self.history = facts["step"], facts["epoch"], facts["history"]

    def _check(self, checkpoint: Path, facts: dict[str, Any]) -> None:
        """Refuse values that no run of this length writes."""
        first = len(facts["history"]) * len(self.sampler)
        right = {
            "step": first <= facts["step"] <= min(first + len(self.sampler), self.steps),
            "history": all(isinstance(record, dict) for record in facts["history"]),
            "epoch": _alike(facts["epoch"], self.epoch),
            "scaler": _alike(facts["scaler"], self.scaler.state_dict()),
        }
        wrong = next((name for name in right if not right[name]), None)
        if wrong is not None:
            raise ValueError(f"{checkpoint} is damaged: its {wrong} is {facts[wrong]!r:.200}")


def _alike(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether ``found`` has the keys of ``wanted``, and numbers for values."""
    return found.keys() == wanted.keys() and all(type(value) in (int, float) for value in found.values())


def _difference(name: str, before: Any, now: Any) -> str:
    """What an error says of the difference between two runs."""
    if name == "config" and isinstance(before, str):
        with contextlib.suppress(ValueError):
            before, now = json.loads(before), json.loads(now)
    name = "images" if name == "pictures" else name
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"its {name} were {before!r:.200}; this run's are different"
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if name == "images":
        counts = [[(d.get(key) or [0])[0] for d in (before, now)] for key in changed]
        words = (
            f"class {key}, which had {then} and has {there}" for key, (then, there) in zip(changed, counts, strict=True)
        )
        return f"its images had other names or sizes, or other pixels: {'; '.join(words)}"
    text = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in changed)
    return f"its {name} had other values: {text:.1000}"
