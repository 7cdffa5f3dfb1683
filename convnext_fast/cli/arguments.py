"""What the subcommands share: their parsers, kinds of arguments, and messages."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROGRAM = "convnext-fast"


def new_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str
) -> argparse.ArgumentParser:
    """Add the subcommand ``name``, which calls ``run`` with its arguments and exits with what that returns."""
    command = commands.add_parser(name, help=summary, description=description)
    command.set_defaults(run=run)
    return command


def add_device(command: argparse.ArgumentParser) -> None:
    """Add ``--device``; see `find_device`."""
    command.add_argument("--device", help="cpu, cuda, xpu, … (default: the accelerator if there is one)")


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the accelerator if there is one.

    Raises:
        ValueError: it is not there.
    """
    import torch

    if name is None:
        kind = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "cpu")
        return torch.device(kind)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from None


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: an integer of at least ``least``."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {least}")
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
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least {least:g} and under {end:g}")
        return value

    return number


def complain(message: str, kind: str = "error") -> None:
    """Say on standard error what is wrong."""
    print(f"{PROGRAM}: {kind}: {message}", file=sys.stderr, flush=True)
