"""The subcommands of ``convnext-fast`` around training: train, evaluate."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from ..config import VARIANTS
from ..files import json_text
from .arguments import (
    MOST_IMAGES,
    MOST_PROCESSES,
    MOST_SIDE,
    add_device,
    at_least,
    between,
    complain,
    file_path,
    find_device,
    new_command,
    say,
)

MOST_SEED = (1 << 63) - 1


def add_train(commands: Any) -> None:
    """The subcommand ``train``."""
    from ..training.distributed import STRATEGIES

    command = new_command(
        commands,
        "train",
        run_train,
        "train or fine-tune on a folder of images, or on the digits",
        "Trains with AdamW, warm-up and cosine; evaluates after each epoch; writes a checkpoint, history.json and at "
        "the end model/, which classify reads, to the output folder. The defaults are the paper's recipe for ImageNet. "
        "Several processes: torchrun --nproc-per-node N -m convnext_fast train …, on the same batches.",
    )
    command.add_argument(
        "data",
        metavar="DATA_DIR|digits",
        help="folder with a folder of images for each class, or with such folders train/ and val/; or the digits",
    )
    start = command.add_mutually_exclusive_group()
    start.add_argument("--variant", choices=VARIANTS, help="start a named architecture from random weights")
    start.add_argument("--config", help="the same for the architecture in a config.json, folder or hub id")
    start.add_argument("--checkpoint", help="fine-tune this folder, file or hub id; other classes get a new classifier")
    command.add_argument(
        "--output", type=file_path, default="convnext_fast_run", help="folder of the run (%(default)s)"
    )
    command.add_argument("--resume", action="store_true", help="continue the run in the output folder, if there is one")
    part = between(0, 1)
    command.add_argument(
        "--holdout", type=part, default=0.1, help="fraction to evaluate on, without val/ (%(default)s)"
    )
    command.add_argument("--image-size", type=at_least(1, MOST_SIDE), help="side in pixels (default: the model's)")
    _add_options(command)
    command.add_argument("--save-every", type=at_least(1), default=0, help="steps between checkpoints (one per epoch)")
    command.add_argument(
        "--workers",
        type=at_least(0, MOST_PROCESSES),
        default=0,
        help="loader processes per training process (%(default)s)",
    )
    command.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default=STRATEGIES[0],
        help="with several processes: each holds the model (ddp) or a part of it (fsdp) (%(default)s)",
    )
    command.add_argument(
        "--skip-unreadable", action="store_true", help="replace an unreadable image by another instead of stopping"
    )
    command.add_argument(
        "--skip-nonfinite",
        action="store_true",
        help="skip a step with a NaN or infinite loss or gradient instead of stopping",
    )
    add_device(command)


def _add_options(command: argparse.ArgumentParser) -> None:
    """The fields of `TrainingOptions`."""
    from ..training.augment import AUGMENTATIONS
    from ..training.options import DTYPES, TrainingOptions

    def add(name: str, type: Callable[[str], Any], text: str) -> None:
        default = getattr(TrainingOptions, name)
        command.add_argument(f"--{name.replace('_', '-')}", type=type, default=default, help=f"{text} (%(default)s)")

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


def run_train(arguments: argparse.Namespace) -> int:
    """``convnext-fast train``."""
    import dataclasses

    from ..training.command import Start, run
    from ..training.options import TrainingOptions
    from ..training.state import find_checkpoint

    fields = {field.name for field in dataclasses.fields(TrainingOptions)} & vars(arguments).keys()
    chosen = {name: getattr(arguments, name) for name in fields}
    chosen["augmentation"] = arguments.augmentation or ("affine" if arguments.data == "digits" else "crop")
    try:
        run(
            arguments.data,
            Start(arguments.variant, arguments.config, arguments.checkpoint),
            TrainingOptions(**chosen),
            arguments.output,
            image_size=arguments.image_size,
            holdout=arguments.holdout,
            resume=arguments.resume,
            save_every=arguments.save_every,
            workers=arguments.workers,
            strategy=arguments.strategy,
            skip_unreadable=arguments.skip_unreadable,
            skip_nonfinite=arguments.skip_nonfinite,
            device=find_device(arguments.device),
        )
    except KeyboardInterrupt:
        checkpoint = find_checkpoint(arguments.output)
        if checkpoint is None:
            raise
        complain(f"interrupted; the same command with --resume continues from {checkpoint}")
        return 130
    return 0


def add_evaluate(commands: Any) -> None:
    """The subcommand ``evaluate``."""
    command = new_command(
        commands,
        "evaluate",
        run_evaluate,
        "score a checkpoint on labelled images",
        "Prints the mean cross-entropy and the accuracy. It scores val/ of a folder that has one, otherwise "
        "all images. Classes are matched by name.",
    )
    what = "folder with a folder of images for each class, or with such folders in val/; or the held-out digits"
    command.add_argument("data", metavar="DATA_DIR|digits", help=what)
    command.add_argument("--checkpoint", required=True, help="folder, file or Hugging Face hub id")
    command.add_argument("--json", action="store_true", help="one JSON object with loss, accuracy and images")
    command.add_argument(
        "--batch-size", type=at_least(1, MOST_IMAGES), default=64, help="images at a time (%(default)s)"
    )
    command.add_argument(
        "--workers", type=at_least(0, MOST_PROCESSES), default=0, help="processes that load images (%(default)s)"
    )
    add_device(command)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """``convnext-fast evaluate``."""
    from ..training.command import evaluate_checkpoint

    score, count = evaluate_checkpoint(
        arguments.data,
        arguments.checkpoint,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=find_device(arguments.device),
    )
    if not math.isfinite(score.loss):
        complain(f"the loss is {score.loss}", "warning")
    if arguments.json:
        say(json_text({"images": count, **score._asdict()}))
    else:
        say(f"{count} images: accuracy {score.accuracy:.2%}, loss {score.loss:.4f}")
    return 0
