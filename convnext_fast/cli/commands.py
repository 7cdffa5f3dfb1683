"""The command ``convnext-fast``: demo, classify, convert, info, train, evaluate, export, bench.

Exit status: 0 for success; 1 if something failed, with the reason on standard error; 2 for wrong usage; 130 if
interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..backends import environment
from ..checkpoints.formats import FORMATS
from ..config import VARIANTS, ConvNextConfig
from ..config.checks import pair
from ..console import new_console, plain
from ..files import json_text
from ..images.default_processor import load_processor
from ..models.convnext import ConvNext
from ..models.huggingface import ConvNextForImageClassification
from . import bench as model_bench
from . import classify as classifying
from . import demo as digits
from . import info as costs
from .arguments import (
    MOST_IMAGES,
    MOST_SIDE,
    PROGRAM,
    SOURCE,
    add_option,
    at_least,
    file_path,
    find_device,
    new_command,
    print_error,
    say,
)
from .convert import convert_checkpoint
from .export import export_onnx
from .train import add_evaluate, add_train


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's arguments) and return the exit status.

    Raises:
        SystemExit: status 2 for wrong usage, 0 for ``--help`` and ``--version``.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal or locale may know few characters
            stream.reconfigure(errors="backslashreplace")
    reader = parser()
    arguments = reader.parse_args(argv)
    if [] in vars(arguments).values():  # argparse drops a second "--"
        reader.error("an argument is missing")
    try:
        environment.check()
        return arguments.run(arguments)
    except BrokenPipeError:
        # The reader of our output, such as `head`, has exited. Nothing must be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print_error(str(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        # PyTorch's errors for too little memory or a failing driver.
        print_error(next(iter(str(error).splitlines()), "there is not enough memory"))
        return 1
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets ``run`` to its function."""
    top = argparse.ArgumentParser(PROGRAM, description="ConvNeXt on fused kernels: try it, use it, train it.")
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    command = new_command(commands, demo, "read handwritten digits that the included model has never seen")
    add_option(command, "--output", file_path, "convnext_fast_digits.png", "the sheet")
    _add_classify(commands)
    _add_convert(commands)
    command = new_command(commands, info, "the size of a model, and what runs on this machine", device=False)
    what = f"{', '.join(VARIANTS)}; or a folder, file or hub id"
    command.add_argument("model", nargs="?", metavar="VARIANT|CHECKPOINT", help=what)
    add_train(commands)
    add_evaluate(commands)
    command = new_command(commands, export, "write a checkpoint as an ONNX file", device=False)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help=SOURCE)
    command.add_argument("destination", metavar="OUT.onnx", type=file_path, help="the file to write")
    command.add_argument("--image-size", type=at_least(1, MOST_SIDE), help="side in pixels (default: the model's)")
    _add_bench(commands)
    return top


def demo(arguments: argparse.Namespace) -> int:
    """Reads scikit-learn's held-out handwritten digits with the included model and fused=True; prints accuracy,
    agreement with fused=False, the speed of both, and memory; draws a sheet of digits, mistakes first.
    """
    return digits.run(new_console(), arguments.output, find_device(arguments.device))


def _add_classify(commands: Any) -> None:
    command = new_command(commands, classify, "label images with a checkpoint")
    what = "file, folder (every image in it and below), or - for standard input: one image, or paths, one per line"
    command.add_argument("images", nargs="+", metavar="IMAGE", help=what)
    command.add_argument("--checkpoint", required=True, help=SOURCE)
    add_option(command, "--top-k", at_least(1), 5, "most labels per image")
    command.add_argument("--json", action="store_true", help="one JSON object per line, with image and predictions")
    add_option(command, "--batch-size", at_least(1, MOST_IMAGES), 16, "images at a time")


def classify(arguments: argparse.Namespace) -> int:
    """Labels images. One that cannot be read is reported on standard error and skipped; the exit status is then 1."""
    console = None if arguments.json else new_console()
    model = ConvNextForImageClassification.from_pretrained(arguments.checkpoint, device=find_device(arguments.device))
    processor, own = load_processor(arguments.checkpoint, model.config)
    if not own:
        taken = f"size {processor.size['shortest_edge']}, mean {processor.image_mean}, std {processor.image_std}"
        print_error(f"{arguments.checkpoint} has no preprocessor_config.json; using {taken}", "note")
    classifier = classifying.Classifier(model, processor)
    images = classifying.sources(arguments.images, None if sys.stdin is None else sys.stdin.buffer)
    failed = False
    for result in classifying.classify(classifier, images, top_k=arguments.top_k, batch_size=arguments.batch_size):
        if result.error is not None:
            print_error(f"{result.name or repr('')}: {result.error}")
            failed = True
            continue
        if not all(math.isfinite(prediction.score) for prediction in result.predictions):
            print_error(f"{result.name}: the model's scores are not all finite numbers", "warning")
        if console is None:
            predictions = [prediction._asdict() for prediction in result.predictions]
            say(json_text({"image": result.name, "predictions": predictions}))
        else:
            console.print(plain(result.name), style="bold", soft_wrap=True)
            for label, _, score in result.predictions:
                shown = f"{score:7.2%}" if classifier.gives_probabilities else f"{score:10.4g}"
                console.print(plain(f"  {shown}  {label}"), soft_wrap=True)
    return int(failed)


def _add_convert(commands: Any) -> None:
    command = new_command(commands, convert, "rewrite a checkpoint under another library's names", device=False)
    command.add_argument("source", metavar="IN", help=SOURCE)
    command.add_argument(
        "destination", metavar="OUT", help="folder, or file ending in .safetensors, .pth, .pt, .bin or .h5"
    )
    command.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    command.add_argument("--ema", action="store_true", help="take the averaged weights of a training checkpoint")


def convert(arguments: argparse.Namespace) -> int:
    """Reads a checkpoint in any of the four formats, which it recognises, and writes it in another."""
    convert_checkpoint(arguments.source, arguments.destination, arguments.to, use_ema=arguments.ema)
    say(f"{arguments.destination} holds {arguments.source} under the names of {arguments.to}")
    return 0


def info(arguments: argparse.Namespace) -> int:
    """Without an argument: versions, the path that fused=True takes on each device, and the variants. With one:
    parameters and multiply-adds of each stage, counted from the configuration.
    """
    console = new_console()
    if arguments.model is None:
        costs.print_here(console)
        costs.print_variants(console)
    elif arguments.model in VARIANTS:
        config = ConvNextConfig.from_variant(arguments.model, num_labels=1000)
        costs.print_config(console, config, f"ConvNeXt, variant {arguments.model}")
    else:
        costs.print_checkpoint(console, arguments.model)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Writes a checkpoint as ONNX with standard operators only, for any number of images of one size. Runs the file
    with onnxruntime and prints how closely it agrees with the model.
    """
    model, found = ConvNext.from_pretrained(arguments.checkpoint, device=find_device("cpu"), output_loading_info=True)
    if found["missing_keys"]:
        lacking = ", ".join(found["missing_keys"])
        raise ValueError(f"{arguments.checkpoint} lacks {lacking}: expected a checkpoint with a classifier")
    height, width = pair(arguments.image_size or model.config.image_size)
    error = export_onnx(model, arguments.destination, height, width)
    say(
        f"{arguments.destination}: pixel_values (N, {model.config.num_channels}, {height}, {width}) to logits "
        f"(N, {model.num_classes}); onnxruntime differs from the model by {error:.1e} of the largest logit"
    )
    return 0


def _add_bench(commands: Any) -> None:
    command = new_command(commands, bench, "what fuse() does for your model")
    command.add_argument("--model", required=True, help="timm:NAME, torchvision:NAME, or hf:DIR (folder or hub id)")
    add_option(command, "--batch-size", at_least(1, MOST_IMAGES), 8, "images at a time")
    add_option(command, "--image-size", at_least(1, MOST_SIDE), 224, "side in pixels")
    help = "16 bits by autocast (%(default)s)"
    command.add_argument("--dtype", choices=model_bench.DTYPES, default="float32", help=help)
    add_option(command, "--rounds", at_least(1), 5, "timed rounds; the median counts")


def bench(arguments: argparse.Namespace) -> int:
    """Measures a model of timm, transformers or torchvision before and after convnext_fast.fuse: speed and memory of a
    call and of a training step, and how closely outputs and gradients agree. The exit status is 1 if it has no block
    that can be fused.
    """
    options = {name: getattr(arguments, name) for name in ("batch_size", "image_size", "dtype", "rounds")}
    return model_bench.run(new_console(), arguments.model, find_device(arguments.device), **options)
