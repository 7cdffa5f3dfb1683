"""The subcommands train and evaluate of ``convnext-fast``."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ..config import VARIANTS
from ..files import json_text
from ..training.augment import AUGMENTATIONS
from ..training.command import Start, evaluate_checkpoint, run
from ..training.distributed import STRATEGIES
from ..training.options import DTYPES, TrainingOptions
from ..training.state import find_checkpoint
from .arguments import (
    MOST_IMAGES,
    MOST_PROCESSES,
    MOST_SIDE,
    SOURCE,
    add_option,
    at_least,
    between,
    file_path,
    find_device,
    new_command,
    print_error,
    say,
)

MOST_SEED = (1 << 63) - 1


def add_train(commands: Any) -> None:
    """The subcommand ``train``."""
    command = new_command(commands, train, "train or fine-tune on a folder of images, or on the digits")
    what = "folder with a folder of images for each class, or with such folders train/ and val/; or the digits"
    command.add_argument("data", metavar="DATA_DIR|digits", help=what)
    start = command.add_mutually_exclusive_group()
    start.add_argument("--variant", choices=VARIANTS, help="start a named architecture from random weights")
    start.add_argument("--config", help="the same for the architecture in a config.json, folder or hub id")
    start.add_argument("--checkpoint", help="fine-tune this folder, file or hub id; other classes get a new classifier")
    add_option(command, "--output", file_path, "convnext_fast_run", "folder of the run")
    command.add_argument("--resume", action="store_true", help="continue the run in the output folder, if there is one")
    add_option(command, "--holdout", between(0, 1), 0.1, "fraction to evaluate on, without val/")
    command.add_argument("--image-size", type=at_least(1, MOST_SIDE), help="side in pixels (default: the model's)")
    _add_options(command)
    command.add_argument("--save-every", type=at_least(1), default=0, help="steps between checkpoints (one per epoch)")
    add_option(command, "--workers", at_least(0, MOST_PROCESSES), 0, "loader processes per training process")
    what = "with several processes: each holds the model (ddp) or a part of it (fsdp) (%(default)s)"
    command.add_argument("--strategy", choices=STRATEGIES, default=STRATEGIES[0], help=what)
    what = "replace an unreadable image by another instead of stopping"
    command.add_argument("--skip-unreadable", action="store_true", help=what)
    what = "skip a step with a NaN or infinite loss or gradient instead of stopping"
    command.add_argument("--skip-nonfinite", action="store_true", help=what)


def _add_options(command: argparse.ArgumentParser) -> None:
    """The fields of `TrainingOptions`."""

    def add(name: str, kind: Callable[[str], Any], text: str) -> None:
        add_option(command, f"--{name.replace('_', '-')}", kind, getattr(TrainingOptions, name), text)

    positive, share = between(0, math.inf), between(0, 1)
    add("epochs", at_least(1), "passes over the images")
    add("batch_size", at_least(1, MOST_IMAGES), "global batch size: images per step, of all processes together")
    add("lr", positive, "learning rate after the warm-up")
    add("min_lr", positive, "learning rate at the end")
    warmup = "epochs of linear warm-up (default: 5, or a fifth of all epochs if that is less)"
    command.add_argument("--warmup-epochs", type=positive, help=warmup)
    add("weight_decay", positive, "weight decay of AdamW, on matrices and convolutions")
    add("layer_decay", positive, "learning rate of each layer relative to the next; 1 for none, 0.8 for fine-tuning")
    add("clip_grad", positive, "largest norm of the gradient; 0 for no clipping")
    command.add_argument("--drop-path", type=share, help="stochastic depth of the last block (default: the model's)")
    add("label_smoothing", share, "fraction of the target spread over all classes")
    add("mixup", positive, "α of mixup; 0 for none")
    add("cutmix", positive, "α of cutmix; 0 for none")
    add("ema", share, "decay of the average of the weights that is evaluated and exported; 0 for none")
    words = "crop and mirror, or rotate and shift slightly (default: crop; affine for the digits)"
    command.add_argument("--augmentation", choices=AUGMENTATIONS, help=words)
    default = TrainingOptions.dtype
    command.add_argument("--dtype", choices=DTYPES, default=default, help="16 bits by autocast (%(default)s)")
    add("seed", at_least(0, MOST_SEED), "seed of all random numbers")


def train(arguments: argparse.Namespace) -> int:
    """Trains with AdamW, warm-up and cosine, and evaluates after each epoch. The output folder gets a checkpoint,
    history.json and, at the end, model/, which classify reads. The defaults follow most of the paper's recipe for
    ImageNet. For several processes, on the same batches: torchrun --nproc-per-node N -m convnext_fast train …
    """
    given = vars(arguments)
    chosen = {field.name: given[field.name] for field in dataclasses.fields(TrainingOptions) if field.name in given}
    chosen["augmentation"] = arguments.augmentation or ("affine" if arguments.data == "digits" else "crop")
    how = ("image_size", "holdout", "resume", "save_every", "workers", "strategy", "skip_unreadable", "skip_nonfinite")
    try:
        run(
            arguments.data,
            Start(arguments.variant, arguments.config, arguments.checkpoint),
            TrainingOptions(**chosen),
            arguments.output,
            device=find_device(arguments.device),
            **{name: given[name] for name in how},
        )
    except KeyboardInterrupt:
        checkpoint = find_checkpoint(arguments.output)
        if checkpoint is None:
            raise
        print_error(f"interrupted; the same command with --resume continues from {checkpoint}")
        return 130
    return 0


def add_evaluate(commands: Any) -> None:
    """The subcommand ``evaluate``."""
    command = new_command(commands, evaluate, "score a checkpoint on labelled images")
    what = "folder with a folder of images for each class, or with such folders in val/; or the held-out digits"
    command.add_argument("data", metavar="DATA_DIR|digits", help=what)
    command.add_argument("--checkpoint", required=True, help=SOURCE)
    command.add_argument("--json", action="store_true", help="one JSON object with loss, accuracy and images")
    add_option(command, "--batch-size", at_least(1, MOST_IMAGES), 64, "images at a time")
    add_option(command, "--workers", at_least(0, MOST_PROCESSES), 0, "processes that load images")


def evaluate(arguments: argparse.Namespace) -> int:
    """Prints the mean cross-entropy and the accuracy on val/ of a folder that has one, otherwise on all images. Classes
    are matched by name.
    """
    options = {"batch_size": arguments.batch_size, "workers": arguments.workers}
    device = find_device(arguments.device)
    score, count = evaluate_checkpoint(arguments.data, arguments.checkpoint, device=device, **options)
    if not math.isfinite(score.loss):
        print_error(f"the loss is {score.loss}", "warning")
    if arguments.json:
        say(json_text({"images": count, **score._asdict()}))
    else:
        say(f"{count} images: accuracy {score.accuracy:.2%}, loss {score.loss:.4f}")
    return 0
