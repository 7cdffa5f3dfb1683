"""What the subcommands share: parsers, types of arguments, and messages."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..backends import environment
from ..backends.choose import KERNEL_DEVICES
from ..console import plain
from ..files import local_path

PROGRAM = "convnext-fast"
SOURCE = "folder, file or Hugging Face hub id"
MOST = 10**9
"""Largest integer argument; larger ones would only fail later, and less clearly."""
MOST_IMAGES, MOST_SIDE, MOST_PROCESSES = 1 << 20, 1 << 13, 1 << 10


def new_command(
    commands: Any, run: Callable[[argparse.Namespace], int], summary: str, device: bool = True
) -> argparse.ArgumentParser:
    """Add a subcommand with the name of ``run``, its docstring as description, and its result as exit status.

    ``device``: whether it has the option ``--device``, see `find_device`.
    """
    command = commands.add_parser(run.__name__, help=summary, description=run.__doc__)
    command.set_defaults(run=run)
    if device:
        command.add_argument("--device", help="cpu, cuda, xpu, … (default: the accelerator if there is one)")
    return command


def add_option(
    command: argparse.ArgumentParser, name: str, kind: Callable[[str], Any], default: Any, text: str
) -> None:
    """Add an option whose help ends with its default."""
    command.add_argument(name, type=kind, default=default, help=f"{text} (%(default)s)")


def find_device(name: str | None) -> torch.device:
    """The device of that name, by default the accelerator if there is one; a ValueError if it is not available."""
    if name is None:
        name = next((kind for kind in KERNEL_DEVICES if getattr(torch, kind).is_available()), "cpu")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if environment.REQUEST == "triton" and not interpreted and not name.startswith(KERNEL_DEVICES):
        raise ValueError(f"CONVNEXT_FAST_BACKEND is 'triton', whose kernels need a GPU: the device is {name!r}")
    try:
        device = torch.empty(0, device=name).device
        torch.zeros(1, device=device).cpu()  # fails on "meta" and on devices that are only names
        return device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"device {name!r} is not available: {reason}") from None


def at_least(least: int, most: int = MOST) -> Callable[[str], int]:
    """An argument's type: an integer in [least, most]."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r:.80}: expected an integer of at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r:.80}: expected an integer of at most {most}")
        return value

    return integer


def between(least: float, end: float) -> Callable[[str], float]:
    """An argument's type: a number in [least, end)."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < end:
            raise argparse.ArgumentTypeError(f"{text!r:.80}: expected a number of at least {least:g} and under {end:g}")
        return value

    return number


def file_path(text: str) -> Path:
    """An argument's type: the path of a file or a folder."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def say(text: str) -> None:
    """Print a line to standard output; see `console.plain`."""
    print(plain(text), flush=True)


def print_error(message: str, kind: str = "error") -> None:
    """Print an error on standard error."""
    if sys.stderr is not None:  # if it is closed, `print` would use standard output
        print(plain(f"{PROGRAM}: {kind}: {message}"), file=sys.stderr, flush=True)
