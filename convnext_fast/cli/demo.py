"""The demo: real handwritten digits that the included model has never seen, read through the fused path.

The model was trained on two thirds of scikit-learn's digits, by the command in ``training/README.md``; the demo reads
the other third, of the same writers.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from ..console import Console, print_table
from ..files import write_files
from ..images.files import FORMATS
from ..images.processor import ConvNextImageProcessor
from ..measuring import alternate
from ..models.huggingface import ConvNextForImageClassification
from ..training.digits import load_digits
from .classify import Classifier

ASSETS = Path(__file__).parents[1] / "assets" / "digits"
BATCH_SIZE = 128
TIMED, ROUNDS = 2, 5
"""Batches in a timed pass, and passes on each path, of which the median counts."""
COLUMNS, ROWS = 12, 8
PAPER, INK, RIGHT, WRONG = "#ffffff", "#333333", "#557755", "#cc2222"


class Outcome(NamedTuple):
    """What the demo found on N held-out images."""

    labels: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray  # the probability of each prediction
    max_difference: float  # of a logit, absolute, between fused and reference
    same_predictions: bool  # for every image
    fused_speed: float  # images per second
    reference_speed: float
    path: str  # of ``fused=True``

    @property
    def correct(self) -> int:
        """Images recognised."""
        return int((self.labels == self.predictions).sum())


def read_held_out(images: Sequence[PIL.Image.Image], labels: Sequence[int], device: torch.device) -> Outcome:
    """Classify ``images`` with the shipped model on both paths."""
    processor = ConvNextImageProcessor.from_pretrained(ASSETS)
    classifiers = [
        Classifier(ConvNextForImageClassification.from_pretrained(ASSETS, fused=fused, device=device), processor)
        for fused in (True, False)
    ]
    fused = classifiers[0]
    inputs = [fused.prepare(image) for image in images]
    batches = [inputs[first : first + BATCH_SIZE] for first in range(0, len(inputs), BATCH_SIZE)]
    logits, expected = (torch.cat(list(map(classifier.logits, batches))) for classifier in classifiers)
    passes = [lambda model=model: list(map(model.logits, batches[:TIMED])) for model in classifiers]
    count = sum(map(len, batches[:TIMED]))
    speeds = [count / statistics.median(taken) for taken in alternate(passes, device, ROUNDS)]
    confidences, predictions = logits.softmax(-1).max(-1)
    like = next(fused.model.parameters())
    return Outcome(
        np.asarray(labels),
        predictions.numpy(),
        confidences.numpy(),
        float((logits - expected).abs().max()),
        bool((predictions == expected.argmax(-1)).all()),
        *speeds,
        f"{fused.model.backend_for(like)} on {device.type}",
    )


def draw_sheet(images: Sequence[PIL.Image.Image], outcome: Outcome) -> PIL.Image.Image:
    """Digits with the prediction below each: mistakes first, framed in red, then the first correct ones."""
    wrong = np.flatnonzero(outcome.labels != outcome.predictions)
    right = np.flatnonzero(outcome.labels == outcome.predictions)
    rows = max(ROWS, -(-len(wrong) // COLUMNS))
    shown = [*wrong, *right][: rows * COLUMNS]
    side, cell_w, cell_h, top = 64, 88, 104, 64
    sheet = PIL.Image.new("RGB", (COLUMNS * cell_w + 16, top + rows * cell_h + 8), PAPER)
    draw = PIL.ImageDraw.Draw(sheet)
    title, text = PIL.ImageFont.load_default(22), PIL.ImageFont.load_default(15)
    count = len(outcome.labels)
    draw.text(
        (14, 10), f"{outcome.correct} of {count} held-out digits read ({outcome.correct / count:.2%})", INK, title
    )
    legend = f"{len(wrong)} mistakes first, in red: predicted for actual" if len(wrong) else "no mistake"
    draw.text((14, 38), legend, WRONG if len(wrong) else RIGHT, text)
    for place, index in enumerate(shown):
        x, y = 8 + place % COLUMNS * cell_w, top + place // COLUMNS * cell_h
        left = x + (cell_w - side) // 2
        digit = PIL.Image.eval(images[index].convert("L"), lambda value: 255 - value)
        sheet.paste(digit.resize((side, side), PIL.Image.Resampling.BICUBIC), (left, y))
        label, read = outcome.labels[index], outcome.predictions[index]
        colour, words = RIGHT, f"{read}  {outcome.confidences[index]:.0%}"
        if label != read:
            colour, words = WRONG, f"{read} for {label}  {outcome.confidences[index]:.0%}"
        draw.rectangle(
            (left - 2, y - 2, left + side + 1, y + side + 1), outline=colour, width=3 if label != read else 1
        )
        draw.text((x + cell_w / 2, y + side + 6), words, colour, text, anchor="ma")
    return sheet


def peak_memory() -> int | None:
    """Peak resident memory of this process, in bytes; None if the system does not report it."""
    # getrusage would include the parent process's memory at the fork.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def run(console: Console, output: Path, device: torch.device) -> int:
    """Run the demo, print its results, write the sheet to ``output``; 1 if the two paths disagree, else 0."""
    format = PIL.Image.registered_extensions().get(output.suffix.lower())
    if format not in FORMATS or format not in PIL.Image.SAVE:
        raise ValueError(f"output {output} has no suffix of an image format: expected one such as .png")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output {output}: there is no folder {output.parent}")
    held_out = load_digits()[1]
    images = [held_out.open(i, 1) for i in range(len(held_out))]
    with console.status("reading digits"):
        outcome = read_held_out(images, held_out.labels, device)
    sheet = draw_sheet(images, outcome)
    write_files(output.parent, {output.name: lambda path: sheet.save(path, format)})
    count = len(images)
    accuracy = f"{outcome.correct / count:.2%} ({outcome.correct} of {count})"
    same = "same predictions" if outcome.same_predictions else "DIFFERENT predictions"
    ratio = outcome.fused_speed / outcome.reference_speed
    memory = peak_memory()
    rows = [
        ("accuracy", accuracy),
        ("fused=True runs", outcome.path),
        ("against fused=False", f"{same}, logits within {outcome.max_difference:.1e}"),
        ("fused=True", f"{outcome.fused_speed:,.0f} images/s"),
        ("fused=False", f"{outcome.reference_speed:,.0f} images/s, so fused is {ratio:.2f} times as fast"),
        ("peak resident memory", "not reported by this system" if memory is None else f"{memory / 2**20:,.0f} MiB"),
    ]
    if device.type == "cuda":
        rows.append(("peak GPU memory", f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB"))
    print_table(console, "ConvNeXt on held-out handwritten digits", None, [*rows, ("image", str(output))])
    return 0 if outcome.same_predictions else 1
