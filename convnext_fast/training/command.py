"""What ``convnext-fast train`` does: load images, model and processor, then run and show the progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import ConvNextConfig
from ..console import Console, new_console, plain
from ..images.default_processor import default_processor, load_processor
from ..images.processor import ConvNextImageProcessor
from ..models.convnext import ConvNext
from .data import evaluation_loader, load_data
from .digits import digits_config, digits_processor, load_digits
from .distributed import process_group
from .evaluation import Reporter, Score, evaluate
from .image_set import load_evaluation_folder
from .loop import MODEL, Trainer
from .options import TrainingOptions


class Start(NamedTuple):
    """Where a run starts: a variant's name, a configuration or a checkpoint; without one, the digits' model."""

    variant: str | None = None
    config: str | None = None
    checkpoint: str | None = None


def run(
    data: str,
    start: Start,
    options: TrainingOptions,
    output: Path,
    *,
    image_size: int | None,
    holdout: float,
    device: torch.device,
    **how: Any,
) -> None:
    """Train, and print where the model is; ``how``: further arguments of `Trainer`."""
    console = new_console()
    with process_group(device) as process:
        training, validation = load_data(data, holdout, options.seed)
        torch.manual_seed(options.seed)
        model, processor = build(start, training.classes, options, image_size, digits=data == "digits")
        if process.rank == 0:
            size = sum(parameter.numel() for parameter in model.parameters())
            held = f", {len(validation)} to evaluate on" if validation else ""
            console.print(
                f"{len(training)} images of {len(training.classes)} classes to train on{held}; {size:,} parameters; "
                f"{process.world} process{'es' if process.world > 1 else ''} on {process.device.type}",
                soft_wrap=True,
            )
        model = model.to(process.device)
        trainer = Trainer(model, training, validation, processor, options, output, process=process, **how)
        reporter = _Progress(console) if process.rank == 0 else Reporter()
        try:
            trainer.run(reporter)
        finally:
            reporter.stop()
        if process.rank == 0:
            console.print(plain(f"model in {output / MODEL}"), soft_wrap=True)


def build(
    start: Start, classes: tuple[str, ...], options: TrainingOptions, image_size: int | None, digits: bool
) -> tuple[ConvNext, ConvNextImageProcessor]:
    """The model to train, on the CPU, and its image processor.

    A checkpoint's classifier is kept if its classes have the same names, in the same order; otherwise it is newly
    initialised.
    """
    drop_path = {} if options.drop_path is None else {"drop_path_rate": options.drop_path}
    named = {"id2label": dict(enumerate(classes)), **drop_path}
    if image_size is not None:
        named["image_size"] = image_size
    source = start.checkpoint or start.config
    if start.checkpoint:
        model = ConvNext.from_pretrained(start.checkpoint, **drop_path)
        if list(model.config.id2label.values()) != list(classes):
            model.reset_classifier(len(classes))
        model.config = model.config.amended(**named)
    elif start.config:
        model = ConvNext(ConvNextConfig.from_pretrained(start.config).amended(**named))
    elif start.variant:
        model = ConvNext(ConvNextConfig.from_variant(start.variant).amended(**named))
    elif digits:
        model = ConvNext(digits_config().amended(**named))
    else:
        raise ValueError("images of a folder need one of --variant, --config and --checkpoint")
    if source:
        processor, own = load_processor(source, model.config)
        if own and image_size is not None:
            processor.size = {"shortest_edge": image_size}
    elif digits and not start.variant:
        processor = digits_processor()
        processor.size = {"shortest_edge": model.config.image_size}
    else:
        processor = default_processor(model.config)
    return model, processor


def evaluate_checkpoint(
    data: str, checkpoint: str, *, batch_size: int, workers: int, device: torch.device
) -> tuple[Score, int]:
    """(score, number of images) of a checkpoint on a folder's ``val/``, a whole folder, or the held-out digits."""
    model = ConvNext.from_pretrained(checkpoint, device=device)
    processor, _ = load_processor(checkpoint, model.config)
    classes = tuple(model.config.id2label.values())
    if data != "digits":
        images = load_evaluation_folder(data, classes)
    else:
        images = load_digits()[1]
        if classes != images.classes:
            raise ValueError(f"{checkpoint} has {len(classes)} classes, {classes[0]!r} first: expected the ten digits")
    loader = evaluation_loader(
        images, processor, channels=model.config.num_channels, batch_size=batch_size, workers=workers
    )
    return evaluate(model, loader, device), len(images)


class _Progress(Reporter):
    """Shows a training run: a bar on a terminal, and a line for each epoch anywhere."""

    def __init__(self, console: Console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def start(self, step: int, steps: int) -> None:
        self.task = self.progress.add_task("", total=steps, completed=step, loss=float("nan"))
        self.progress.start()
        if step:
            self.console.print(f"resumed at step {step} of {steps}")

    def step(self, step: int, loss: float, lr: float) -> None:
        self.progress.update(self.task, completed=step + 1, loss=loss)

    def epoch(self, record: dict[str, Any]) -> None:
        words = [f"epoch {record['epoch']}", f"loss {record['loss']:.4f}"]
        if "accuracy" in record:
            words += [f"validation loss {record['validation_loss']:.4f}", f"accuracy {record['accuracy']:.2%}"]
        words += [f"lr {record['lr']:.2e}", f"{record['images_per_second']:.0f} images/s"]
        self.console.print("  ".join(words), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(plain(f"note: {text}"), soft_wrap=True)

    def stop(self) -> None:
        self.progress.stop()
