"""Labels for images from files, folders and standard input, by a model and its image processor."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch

from ..files import local_path
from ..images.files import FORMATS, MOST_BYTES, find_images, open_image, to_channels
from ..images.processor import ConvNextImageProcessor
from ..models.huggingface import ConvNextForImageClassification

STDIN = "-"


class Prediction(NamedTuple):
    """A class, its index, and its score: a probability, or the raw output of a regression."""

    label: str
    index: int
    score: float


class Result(NamedTuple):
    """The result for one image: predictions, best first, or an error."""

    name: str
    predictions: list[Prediction]
    error: str | None = None


class Classifier:
    """A classification model, frozen if it runs the fused ops, with the preprocessing it needs."""

    def __init__(self, model: ConvNextForImageClassification, processor: ConvNextImageProcessor):
        if not model.config.num_labels:
            raise ValueError("the model has no classifier (num_labels is 0): expected one with classes")
        self.model = model.eval()
        if model.fused:
            model.freeze()
        self.processor, self.channels = processor, model.config.num_channels

    @property
    def gives_probabilities(self) -> bool:
        """Whether scores are probabilities; a regression's are the model's outputs."""
        return self.model.config.problem_type != "regression" and self.model.config.num_labels != 1

    def prepare(self, image: PIL.Image.Image) -> np.ndarray:
        """An image of any size and mode as the model's input (channels, height, width), float32."""
        return self.processor(to_channels(image, self.channels)).pixel_values[0]

    @torch.inference_mode()
    def logits(self, inputs: Sequence[np.ndarray]) -> torch.Tensor:
        """The model's outputs (N, num_labels) in float32 on the CPU, for a batch of N ≥ 1 inputs of `prepare`."""
        like = next(self.model.parameters())
        batch = torch.from_numpy(np.stack(inputs)).to(like.device, like.dtype)
        return self.model(batch).logits.float().cpu()

    def predictions(self, logits: torch.Tensor, top_k: int) -> list[Prediction]:
        """The ``top_k`` best classes (or as many as there are) of one row of `logits`."""
        config = self.model.config
        if not self.gives_probabilities:
            scores = logits
        elif config.problem_type == "multi_label_classification":
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(-1)
        best = scores.topk(min(top_k, len(scores)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Prediction(str(config.id2label.get(i, f"LABEL_{i}")), i, score) for i, score in pairs]


def sources(
    arguments: Iterable[str], standard_input: io.BufferedIOBase | None
) -> Iterator[tuple[str, Path | bytes | str]]:
    """(name, and a file, its bytes, or an error) of each image that the arguments name: files, folders, and "-".

    "-" stands for ``standard_input`` (None if it is closed), which holds one image, or paths of files and folders, one
    per line.
    """
    for argument in arguments:
        if argument != STDIN:
            yield from _path(argument)
        elif standard_input is None:
            yield "standard input", "it is closed"
        else:
            try:
                data = standard_input.read(MOST_BYTES)
            except OSError as error:  # a folder, say
                yield "standard input", _reason(error)
            else:
                yield from _standard_input(data)


def _path(argument: str) -> Iterator[tuple[str, Path | str]]:
    unreadable: list[OSError] = []
    try:
        path = local_path(argument)
        if not path.is_dir():
            yield argument, path
            return
        images = find_images(path, unreadable.append)
    except (OSError, ValueError) as error:  # an empty name, or one that is too long
        yield argument, _reason(error)
        return
    if not images and not unreadable:
        yield argument, "the folder holds no image of a format that is read"
    for error in unreadable:
        yield str(error.filename or argument), f"the folder cannot be read: {_reason(error)}"
    for image in images:
        yield str(image), image


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _standard_input(data: bytes) -> Iterator[tuple[str, Path | bytes | str]]:
    try:
        PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        is_image = True
    except PIL.UnidentifiedImageError:
        is_image = False
    except Exception:  # of a damaged image: decoding it will say what is wrong
        is_image = True
    if is_image:
        yield "standard input", data
        return
    try:
        lines = [line.strip() for line in data.decode().splitlines()]
    except UnicodeDecodeError:
        yield "standard input", "neither an image of a format that is read nor a list of paths"
        return
    paths = [line for line in lines if line]
    if not paths:
        yield "standard input", "contains neither an image nor a path"
    for path in paths:
        yield from _path(path)


def classify(
    classifier: Classifier, images: Iterable[tuple[str, Path | bytes | str]], *, top_k: int, batch_size: int
) -> Iterator[Result]:
    """A `Result` for each of ``images`` (see `sources`), in order; an error in one does not stop the others.

    Images are read and results are yielded one batch at a time.
    """
    waiting: list[tuple[str, np.ndarray | str]] = []
    shape = None
    for name, source in images:
        entry = source if isinstance(source, str) else _input(classifier, source)
        if isinstance(entry, np.ndarray) and entry.shape != shape:
            # A processor that does not resize gives inputs of several sizes, and a batch has one.
            yield from _results(classifier, waiting, top_k)
            waiting, shape = [], entry.shape
        waiting.append((name, entry))
        if len(waiting) >= batch_size:
            yield from _results(classifier, waiting, top_k)
            waiting = []
    yield from _results(classifier, waiting, top_k)


def _input(classifier: Classifier, source: Path | bytes) -> np.ndarray | str:
    """An image as the model's input, or an error."""
    try:
        return classifier.prepare(open_image(source, classifier.channels))
    except (OSError, ValueError) as error:
        return _reason(error)
    except MemoryError:
        return "there is not enough memory for it"


def _results(classifier: Classifier, entries: list[tuple[str, np.ndarray | str]], top_k: int) -> Iterator[Result]:
    inputs = [entry for _, entry in entries if isinstance(entry, np.ndarray)]
    error = None
    try:
        rows = iter(classifier.logits(inputs) if inputs else ())
    except (ValueError, MemoryError, RuntimeError) as refusal:
        # All inputs of a batch have one shape, so the model refuses all of them.
        error = next(iter(str(refusal).splitlines()), "there is not enough memory for it")
    for name, entry in entries:
        if isinstance(entry, str) or error:
            yield Result(name, [], entry if isinstance(entry, str) else error)
        else:
            yield Result(name, classifier.predictions(next(rows), top_k))
