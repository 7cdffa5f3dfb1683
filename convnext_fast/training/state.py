"""A run's checkpoint: whole or not there, and readable without running code.

It keeps the weights under ``model`` and their average under ``model_ema``, as the official repository does, so that
`checkpoint.load_checkpoint` reads it too.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_files import write_files

CHECKPOINT = "checkpoint.pt"
ENTRIES = ("step", "model", "model_ema", "optimizer", "epoch_loss", "history", "identity")
"""What a checkpoint holds."""


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Write a run's state, of tensors and plain values, to ``directory``/checkpoint.pt.

    Raises:
        OSError: it cannot be written; the checkpoint before it is untouched.
    """

    def write(path: Path) -> None:
        try:
            torch.save(state, path)
        except RuntimeError as error:
            # torch's archive writer reports a failed write as a RuntimeError.
            raise OSError(f"cannot write {directory / CHECKPOINT}, is the disk full? ({error})") from error

    write_files(directory, {CHECKPOINT: write})


def load_state(directory: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU; no code in it is run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is truncated, or holds something else.
    """
    path = directory / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory} holds no {CHECKPOINT}") from None
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no whole checkpoint: {error}") from error
    if not isinstance(state, dict) or set(ENTRIES) - set(state):
        raise ValueError(f"{path} is no checkpoint of a training run")
    return state
