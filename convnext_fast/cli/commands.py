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

from ..backends import environment
from ..config import VARIANTS
from ..console import plain
from ..files import json_text
from . import train as cli_training
from .arguments import (
    MOST_IMAGES,
    MOST_SIDE,
    PROGRAM,
    add_device,
    at_least,
    complain,
    file_path,
    find_device,
    new_command,
    say,
)

FORMATS = ("timm", "torchvision", "transformers", "official")


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
    if [] in vars(arguments).values():  # argparse takes a second "--" for nothing
        reader.error("an argument is missing")
    try:
        environment.check()
        return arguments.run(arguments)
    except BrokenPipeError:
        # The reader of our output has exited, as `head` does. There is nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        complain(str(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        # What PyTorch says of the machine: no memory for a size, or a driver that fails.
        complain(next(iter(str(error).splitlines()), "there is not enough memory"))
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets ``run`` to its function."""
    from .. import __version__

    top = argparse.ArgumentParser(PROGRAM, description="ConvNeXt on fused kernels: try it, use it, train it.")
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_classify(commands)
    _add_convert(commands)
    _add_info(commands)
    cli_training.add_train(commands)
    cli_training.add_evaluate(commands)
    _add_export(commands)
    _add_bench(commands)
    return top


def _add_demo(commands: Any) -> None:
    command = new_command(
        commands,
        "demo",
        run_demo,
        "read handwritten digits that the included model has never seen",
        "Reads scikit-learn's held-out handwritten digits with the model in this package through fused=True; prints "
        "accuracy, agreement with fused=False, speed of both and memory; draws a sheet of digits, mistakes first.",
    )
    command.add_argument("--output", type=file_path, default="convnext_fast_digits.png", help="the sheet (%(default)s)")
    add_device(command)


def run_demo(arguments: argparse.Namespace) -> int:
    """``convnext-fast demo``."""
    from ..console import new_console

    console = new_console()
    from . import demo

    return demo.run(console, arguments.output, find_device(arguments.device))


def _add_classify(commands: Any) -> None:
    command = new_command(
        commands,
        "classify",
        run_classify,
        "label images with a checkpoint",
        "Labels images. An image that cannot be read is reported on standard error, and the others continue; the exit "
        "status is then 1.",
    )
    what = "file, folder (every image in it and below), or - for standard input: one image, or paths, one per line"
    command.add_argument("images", nargs="+", metavar="IMAGE", help=what)
    command.add_argument("--checkpoint", required=True, help="folder, file or Hugging Face hub id")
    command.add_argument("--top-k", type=at_least(1), default=5, help="most labels per image (%(default)s)")
    command.add_argument("--json", action="store_true", help="one JSON object per line, with image and predictions")
    command.add_argument(
        "--batch-size", type=at_least(1, MOST_IMAGES), default=16, help="images at a time (%(default)s)"
    )
    add_device(command)


def run_classify(arguments: argparse.Namespace) -> int:
    """``convnext-fast classify``."""
    from ..console import new_console
    from ..images.default_processor import load_processor
    from ..models.huggingface import ConvNextForImageClassification
    from . import classify

    console = None if arguments.json else new_console()
    device = find_device(arguments.device)
    model = ConvNextForImageClassification.from_pretrained(arguments.checkpoint, device=device)
    processor, own = load_processor(arguments.checkpoint, model.config)
    if not own:
        taken = f"size {processor.size['shortest_edge']}, mean {processor.image_mean}, std {processor.image_std}"
        complain(f"{arguments.checkpoint} has no preprocessor_config.json; using {taken}", "note")
    classifier = classify.Classifier(model, processor)
    pictures = classify.sources(arguments.images, None if sys.stdin is None else sys.stdin.buffer)
    failed = False
    for result in classify.classify(classifier, pictures, top_k=arguments.top_k, batch_size=arguments.batch_size):
        if result.error is not None:
            complain(f"{result.name or repr('')}: {result.error}")
            failed = True
            continue
        if not all(math.isfinite(prediction.score) for prediction in result.predictions):
            complain(f"{result.name}: the model's scores are not all finite numbers", "warning")
        if console is None:
            predictions = [prediction._asdict() for prediction in result.predictions]
            say(json_text({"image": result.name, "predictions": predictions}))
        else:
            console.print(plain(result.name), style="bold", soft_wrap=True)
            for label, _, score in result.predictions:
                shown = f"{score:7.2%}" if classifier.gives_probabilities else f"{score:10.4g}"
                console.print(plain(f"  {shown}  {label}"), soft_wrap=True)
    return 1 if failed else 0


def _add_convert(commands: Any) -> None:
    command = new_command(
        commands,
        "convert",
        run_convert,
        "rewrite a checkpoint under another library's names",
        "Reads a checkpoint of any of the four formats, which it recognises, and writes it in another.",
    )
    command.add_argument("source", metavar="IN", help="folder, file or Hugging Face hub id")
    command.add_argument("destination", metavar="OUT", help="folder, or file ending in .safetensors, .pth, .pt or .bin")
    command.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    command.add_argument("--ema", action="store_true", help="take the averaged weights of a training checkpoint")


def run_convert(arguments: argparse.Namespace) -> int:
    """``convnext-fast convert``."""
    from .convert import convert_checkpoint

    convert_checkpoint(arguments.source, arguments.destination, arguments.to, use_ema=arguments.ema)
    say(f"{arguments.destination} holds {arguments.source} under the names of {arguments.to}")
    return 0


def _add_info(commands: Any) -> None:
    command = new_command(
        commands,
        "info",
        run_info,
        "the size of a model, and what runs on this machine",
        "Without an argument: versions, the path that fused=True takes on each device, and the variants. With one: "
        "parameters and multiply-adds of each stage, counted from the configuration.",
    )
    command.add_argument(
        "model", nargs="?", metavar="VARIANT|CHECKPOINT", help=f"{', '.join(VARIANTS)}; or a folder, file or hub id"
    )


def run_info(arguments: argparse.Namespace) -> int:
    """``convnext-fast info``."""
    from ..config import ConvNextConfig
    from ..console import new_console
    from . import info

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


def _add_export(commands: Any) -> None:
    command = new_command(
        commands,
        "export",
        run_export,
        "write a checkpoint as an ONNX file",
        "Writes a checkpoint as ONNX with standard operators only, for any number of images of one size; runs the file "
        "with onnxruntime, and prints how closely it agrees with the model.",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, file or Hugging Face hub id")
    command.add_argument("destination", metavar="OUT.onnx", type=file_path, help="the file to write")
    command.add_argument("--image-size", type=at_least(1, MOST_SIDE), help="side in pixels (default: the model's)")


def run_export(arguments: argparse.Namespace) -> int:
    """``convnext-fast export``."""
    from ..models.convnext import ConvNext
    from .export import export_onnx

    model = ConvNext.from_pretrained(arguments.checkpoint, device=find_device("cpu"))
    size = arguments.image_size or model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    error = export_onnx(model, arguments.destination, height, width)
    say(
        f"{arguments.destination}: pixel_values (N, {model.config.num_channels}, {height}, {width}) to logits "
        f"(N, {model.num_classes}); onnxruntime differs from the model by {error:.1e} of the largest logit"
    )
    return 0


def _add_bench(commands: Any) -> None:
    command = new_command(
        commands,
        "bench",
        run_bench,
        "what fuse() does for your model",
        "Measures a model of timm, transformers or torchvision before and after convnext_fast.fuse: speed and memory "
        "of a call and of a training step, and how closely outputs and gradients agree. The exit status is 1 if it has "
        "no block that can be fused.",
    )
    command.add_argument("--model", required=True, help="timm:NAME, torchvision:NAME, or hf:DIR (folder or hub id)")
    command.add_argument(
        "--batch-size", type=at_least(1, MOST_IMAGES), default=8, help="images at a time (%(default)s)"
    )
    command.add_argument("--image-size", type=at_least(1, MOST_SIDE), default=224, help="side in pixels (%(default)s)")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="16 bits by autocast (%(default)s)",
    )
    command.add_argument("--rounds", type=at_least(1), default=5, help="timed rounds; the median counts (%(default)s)")
    add_device(command)


def run_bench(arguments: argparse.Namespace) -> int:
    """``convnext-fast bench``."""
    from ..console import new_console
    from . import bench as model_bench

    return model_bench.run(
        new_console(),
        arguments.model,
        find_device(arguments.device),
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        dtype=arguments.dtype,
        rounds=arguments.rounds,
    )


if __name__ == "__main__":
    sys.exit(main())
