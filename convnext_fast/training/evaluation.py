"""Scoring a model on labelled images, and reporting the progress of a run."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from ..console import plain
from ..models.convnext import ConvNext
from .data import batches
from .distributed import largest_over_processes, raise_on_all, sum_over_processes


class Score(NamedTuple):
    """The result of an evaluation: mean cross-entropy and accuracy."""

    loss: float
    accuracy: float


class Reporter:
    """Is told about the progress of a run. This one only prints warnings, on standard error."""

    def start(self, step: int, steps: int) -> None:
        """Training begins at ``step`` of ``steps``."""

    def step(self, step: int, loss: float, lr: float) -> None:
        """Step number ``step``, from 0, is done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done; ``record`` is its entry in the history."""

    def warn(self, text: str) -> None:
        """Something was skipped."""
        print(plain(f"note: {text}"), file=sys.stderr)

    def stop(self) -> None:
        """The run has ended, or failed."""


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``; off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def evaluate(
    model: ConvNext,
    loader: DataLoader,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    reporter: Reporter | None = None,
) -> Score:
    """The score of ``model`` over the images of all processes' loaders; sets evaluation mode.

    Args:
        model, device: what to score, and where it is.
        loader: of `data.evaluation_loader`.
        dtype: to compute in, one of 16 bits by autocast.
        reporter: is told about images that are left out.

    Raises:
        ChildProcessError: a process that loads images died.
        ValueError: an image cannot be read, or none can.
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    feed = batches(loader)
    # If the model is split over processes, all must call it equally often: one without images calls it with an empty
    # batch.
    for _ in range(largest_over_processes(len(loader), device)):
        batch = next(feed, loader.collate_fn.nothing)
        raise_on_all(batch if isinstance(batch, Exception) else None, device)
        for text in batch.unreadable if reporter else ():
            reporter.warn(f"left out {text}")
        pixels = batch.pixels.to(device, memory_format=torch.channels_last)
        labels = batch.targets.argmax(1).to(device)
        with autocast(device, dtype):
            logits = model(pixels).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        totals += torch.stack([loss.double(), right.double(), totals.new_tensor(len(labels))])
    loss, right, count = sum_over_processes(totals).tolist()
    if not count:
        raise ValueError("none of the images to evaluate on can be read")
    return Score(loss / count, right / count)
