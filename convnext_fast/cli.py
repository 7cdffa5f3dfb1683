"""The command ``convnext-fast``: demo, classify, convert, info, train, bench.

Exit status: 0 for success; 1 if something failed, with the reason on standard error; 2 for wrong usage; 130 if
interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import VARIANTS

if TYPE_CHECKING:
    import torch

PROGRAM = "convnext-fast"
FORMATS = ("timm", "torchvision", "transformers", "official")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's arguments) and return the exit status.

    Raises:
        SystemExit: status 2 for wrong usage, 0 for ``--help`` and ``--version``.
    """
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does. Nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets ``run`` to its function."""
    from . import __version__

    top = argparse.ArgumentParser(PROGRAM, description="ConvNeXt on fused kernels: try it, use it, train it.")
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_classify(commands)
    _add_convert(commands)
    _add_info(commands)
    _add_train(commands)
    _add_bench(commands)
    return top


def _add_demo(commands: Any) -> None:
    command = _command(
        commands,
        "demo",
        run_demo,
        "read handwritten digits that the shipped model never saw",
        "Reads scikit-learn's held-out handwritten digits with the model in this package through fused=True; prints "
        "accuracy, agreement with fused=False, speed of both and memory; draws a sheet of digits, mistakes first.",
    )
    command.add_argument("--output", type=Path, default="convnext_fast_digits.png", help="the sheet (%(default)s)")
    _add_device(command)


def run_demo(arguments: argparse.Namespace) -> int:
    """``convnext-fast demo``."""
    from .console import new_console

    console = new_console()
    from . import demo

    return demo.run(console, arguments.output, _device(arguments.device))


def _add_classify(commands: Any) -> None:
    command = _command(
        commands,
        "classify",
        run_classify,
        "label images with a checkpoint",
        "Labels images. One that cannot be read is reported on standard error and the rest go on; the exit status is 1 "
        "if there was any.",
    )
    what = "file, folder (every image in it and below), or - for standard input: one image, or paths, one a line"
    command.add_argument("images", nargs="+", metavar="IMAGE", help=what)
    command.add_argument("--checkpoint", required=True, help="folder, file or Hugging Face hub id")
    command.add_argument("--top-k", type=_at_least(1), default=5, help="labels an image, at most (%(default)s)")
    command.add_argument("--json", action="store_true", help="one JSON object a line, with image and predictions")
    command.add_argument("--batch-size", type=_at_least(1), default=16, help="images at a time (%(default)s)")
    _add_device(command)


def run_classify(arguments: argparse.Namespace) -> int:
    """``convnext-fast classify``."""
    from . import classify
    from .console import new_console
    from .huggingface import ConvNextForImageClassification

    console = None if arguments.json else new_console()
    device = _device(arguments.device)
    model = ConvNextForImageClassification.from_pretrained(arguments.checkpoint, device=device)
    processor, own = classify.load_processor(arguments.checkpoint, model.config)
    if not own:
        taken = f"size {processor.size['shortest_edge']}, mean {processor.image_mean}, std {processor.image_std}"
        _complain(f"{arguments.checkpoint} has no preprocessor_config.json; taking {taken}", "note")
    classifier = classify.Classifier(model, processor)
    pictures = classify.sources(arguments.images, sys.stdin.buffer)
    failed = False
    for result in classify.classify(classifier, pictures, top_k=arguments.top_k, batch_size=arguments.batch_size):
        if result.error is not None:
            _complain(f"{result.name}: {result.error}")
            failed = True
        elif console is None:
            predictions = [prediction._asdict() for prediction in result.predictions]
            print(json.dumps({"image": result.name, "predictions": predictions}), flush=True)
        else:
            console.print(result.name, markup=False, style="bold", soft_wrap=True)
            for label, _, score in result.predictions:
                console.print(f"  {score:7.2%}  {label}", markup=False, soft_wrap=True)
    return 1 if failed else 0


def _add_convert(commands: Any) -> None:
    command = _command(
        commands,
        "convert",
        run_convert,
        "rewrite a checkpoint under another library's names",
        "Reads a checkpoint of any of the four formats, which it recognises, and writes it in another.",
    )
    command.add_argument("source", metavar="IN", help="folder, file or Hugging Face hub id")
    command.add_argument("destination", metavar="OUT", help="folder, or file ending in .safetensors, .pth, .pt or .bin")
    command.add_argument("--to", required=True, choices=FORMATS, help="whose names to write")
    command.add_argument("--ema", action="store_true", help="take the averaged weights of a training checkpoint")


def run_convert(arguments: argparse.Namespace) -> int:
    """``convnext-fast convert``."""
    from .checkpoint import convert_checkpoint

    convert_checkpoint(arguments.source, arguments.destination, arguments.to, use_ema=arguments.ema)
    print(f"{arguments.destination} holds {arguments.source} under the names of {arguments.to}")
    return 0


def _add_info(commands: Any) -> None:
    command = _command(
        commands,
        "info",
        run_info,
        "what a model costs, and what runs on this machine",
        "Without an argument: versions, the path that fused=True takes on each device, and the variants. With one: "
        "parameters and multiply-adds of each stage, counted from the configuration.",
    )
    command.add_argument(
        "model", nargs="?", metavar="VARIANT|CHECKPOINT", help=f"{', '.join(VARIANTS)}; or a folder, file or hub id"
    )


def run_info(arguments: argparse.Namespace) -> int:
    """``convnext-fast info``."""
    from . import info
    from .config import ConvNextConfig
    from .console import new_console

    console = new_console()
    if arguments.model is None:
        info.print_here(console)
        info.print_variants(console)
    elif arguments.model in VARIANTS:
        config = ConvNextConfig.from_variant(arguments.model, num_labels=1000)
        info.print_config(console, config, f"ConvNeXt, variant {arguments.model}")
    else:
        info.print_checkpoint(console, arguments.model)
    return 0


def _add_train(commands: Any) -> None:
    command = _command(
        commands,
        "train",
        run_train,
        "train or fine-tune on a folder of images, or on the digits",
        "Trains with AdamW, warm-up and cosine; evaluates after each epoch; writes checkpoint.pt, history.json and in "
        "the end model/, which classify takes, to the output folder. The defaults are the paper's recipe for ImageNet. "
        "Several processes: torchrun --nproc-per-node N -m convnext_fast train …, with the same result.",
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
    command.add_argument("--output", type=Path, default="convnext_fast_run", help="folder of the run (%(default)s)")
    command.add_argument(
        "--resume", action="store_true", help="go on from the run in the output folder, if there is one"
    )
    part = _between(0, 1)
    command.add_argument("--holdout", type=part, default=0.1, help="part to evaluate on, without val/ (%(default)s)")
    command.add_argument("--image-size", type=_at_least(1), help="side in pixels (default: the model's)")
    _add_options(command)
    command.add_argument("--save-every", type=_at_least(1), default=0, help="steps between checkpoints (one an epoch)")
    command.add_argument(
        "--workers", type=_at_least(0), default=0, help="loader processes for each process (%(default)s)"
    )
    _add_device(command)


def _add_options(command: argparse.ArgumentParser) -> None:
    """The fields of `TrainingOptions`."""
    from .training.augment import AUGMENTATIONS
    from .training.options import TrainingOptions

    def add(name: str, type: Callable[[str], Any], text: str) -> None:
        default = getattr(TrainingOptions, name)
        command.add_argument(f"--{name.replace('_', '-')}", type=type, default=default, help=f"{text} (%(default)s)")

    positive, share = _between(0, math.inf), _between(0, 1)
    add("epochs", _at_least(1), "passes over the images")
    add("batch_size", _at_least(1), "images a step, of all processes together")
    add("lr", positive, "learning rate after the warm-up")
    add("min_lr", positive, "learning rate at the end")
    add("warmup_epochs", positive, "length of the linear warm-up")
    add("weight_decay", positive, "of AdamW, on matrices and convolutions")
    add("layer_decay", positive, "learning rate of each layer relative to the next; 1 for none, 0.8 for fine-tuning")
    add("clip_grad", positive, "largest norm of the gradient; 0 for no clipping")
    command.add_argument("--drop-path", type=share, help="stochastic depth of the last block (the model's)")
    add("label_smoothing", share, "part of the target spread over all classes")
    add("mixup", positive, "α of mixup; 0 for none")
    add("cutmix", positive, "α of cutmix; 0 for none")
    add("ema", share, "decay of the average of the weights that is evaluated and exported; 0 for none")
    words = "crop and mirror, or turn and shift a little (crop; affine for the digits)"
    command.add_argument("--augmentation", choices=AUGMENTATIONS, help=words)
    command.add_argument("--bf16", action="store_true", help="compute under bfloat16 autocast")
    add("seed", _at_least(0), "of everything random")


def run_train(arguments: argparse.Namespace) -> int:
    """``convnext-fast train``."""
    import dataclasses

    from .training.command import Start, run
    from .training.options import TrainingOptions
    from .training.state import CHECKPOINT

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
            device=_device(arguments.device),
        )
    except KeyboardInterrupt:
        if not (arguments.output / CHECKPOINT).exists():
            raise
        _complain(f"interrupted; the same command with --resume goes on from {arguments.output / CHECKPOINT}")
        return 130
    return 0


def _add_bench(commands: Any) -> None:
    command = _command(
        commands,
        "bench",
        run_bench,
        "what fuse() does for a model that you have",
        "Measures a model of timm, transformers or torchvision before and after convnext_fast.fuse: speed and memory "
        "of a call and of a training step, and how closely outputs and gradients agree. The exit status is 1 if it has "
        "no block that can be fused.",
    )
    command.add_argument("--model", required=True, help="timm:NAME, torchvision:NAME, or hf:DIR (folder or hub id)")
    command.add_argument("--batch-size", type=_at_least(1), default=8, help="images at a time (%(default)s)")
    command.add_argument("--image-size", type=_at_least(1), default=224, help="side in pixels (%(default)s)")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="16 bits by autocast (%(default)s)",
    )
    command.add_argument("--rounds", type=_at_least(1), default=5, help="timed rounds; the median counts (%(default)s)")
    _add_device(command)


def run_bench(arguments: argparse.Namespace) -> int:
    """``convnext-fast bench``."""
    from . import model_bench
    from .console import new_console

    return model_bench.run(
        new_console(),
        arguments.model,
        _device(arguments.device),
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        dtype=arguments.dtype,
        rounds=arguments.rounds,
    )


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=description)
    command.set_defaults(run=run)
    return command


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda, xpu, … (default: the accelerator if there is one)")


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        kind = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "cpu")
        return torch.device(kind)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from None


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {least}")
        return value

    return integer


def _between(least: float, end: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < end:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least {least:g} and under {end:g}")
        return value

    return number


def _complain(message: str, kind: str = "error") -> None:
    print(f"{PROGRAM}: {kind}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
