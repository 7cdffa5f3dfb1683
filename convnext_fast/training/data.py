"""Labelled pictures, and the batches they are served in.

Every random choice is drawn from a generator keyed by (seed, epoch, picture or place in the epoch). So a batch does not
depend on how many processes or loader workers there are, nor on whether the run was interrupted before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..image_files import find_images, open_image, to_channels
from ..image_processor import ConvNextImageProcessor
from .augment import augment, mix_pairs

_ORDER, _AUGMENT, _MIX, _SPLIT = range(4)
VALIDATION_FOLDERS = ("val", "validation")


class ImageSet:
    """Pictures with a class each.

    Args:
        pictures: image files, or arrays (height, width) or (height, width, channels) of uint8.
        labels: class index of each.
        classes: names of the classes.
    """

    def __init__(self, pictures: Sequence[Path | np.ndarray], labels: Sequence[int], classes: Sequence[str]):
        self.pictures, self.labels, self.classes = list(pictures), list(labels), tuple(classes)

    def __len__(self) -> int:
        return len(self.pictures)

    def open(self, index: int, channels: int) -> PIL.Image.Image:
        """Picture ``index``, with ``channels`` channels.

        Raises:
            ValueError: it cannot be read; the message names the file.
        """
        picture = self.pictures[index]
        if isinstance(picture, np.ndarray):
            return to_channels(PIL.Image.fromarray(picture), channels)
        try:
            return open_image(picture, channels)
        except (ValueError, OSError) as error:
            raise ValueError(f"{picture}: {error}") from error

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The pictures at ``indices``."""
        return ImageSet([self.pictures[i] for i in indices], [self.labels[i] for i in indices], self.classes)


def load_folder(folder: Path, classes: Sequence[str] | None = None) -> ImageSet:
    """The pictures of a folder that has a folder for each class.

    Args:
        folder: holds ``class name/…/picture``.
        classes: the classes there have to be, in order; None takes the folders' names, sorted.

    Raises:
        ValueError: fewer than two classes, a class without a picture, or other classes than asked for.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if classes is not None and set(names) - set(classes):
        raise ValueError(f"{folder} has the classes {sorted(set(names) - set(classes))}, which are not trained on")
    if len(names) < 2 and classes is None:
        raise ValueError(f"{folder} has {len(names)} folders: expected one for each class, at least two")
    pictures, labels = [], []
    for label, name in enumerate(names if classes is None else classes):
        found = find_images(folder / name) if name in names else []
        if not found and classes is None:
            raise ValueError(f"{folder / name} holds no image that pillow can read")
        pictures += found
        labels += [label] * len(found)
    if not pictures:
        raise ValueError(f"{folder} holds no image of the classes {', '.join(classes or ())}")
    return ImageSet(pictures, labels, names if classes is None else classes)


def load_data(source: str | Path, holdout: float, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """(training pictures, pictures to evaluate on or None).

    Args:
        source: "digits"; or a folder with ``train/`` and ``val/`` (or ``validation/``), each with a folder for each
            class; or a folder with a folder for each class.
        holdout: where there is no ``val/``, the part of each class that is evaluated on and not trained on, in [0, 1).
        seed: chooses that part.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: the digits need scikit-learn.
        ValueError: the folder is not laid out as above.
    """
    if str(source) == "digits":
        from .digits import load_digits

        return split(load_digits()[0], holdout, seed)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{source} is no folder: expected one with a folder for each class, or 'digits'")
    if not (folder / "train").is_dir():
        return split(load_folder(folder), holdout, seed)
    training = load_folder(folder / "train")
    for name in VALIDATION_FOLDERS:
        if (folder / name).is_dir():
            return training, load_folder(folder / name, training.classes)
    return split(training, holdout, seed)


def split(images: ImageSet, holdout: float, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """Put the part ``holdout`` of each class aside, at least one picture unless it is 0.

    Raises:
        ValueError: a class would have no picture left to train on.
    """
    if holdout == 0:
        return images, None
    labels, aside = np.array(images.labels), np.zeros(len(images), bool)
    for label, name in enumerate(images.classes):
        members = np.flatnonzero(labels == label)
        count = max(1, round(holdout * len(members)))
        if count >= len(members):
            raise ValueError(f"class {name!r} has {len(members)} pictures: too few to hold out {holdout:g} of them")
        aside[_generator(seed, _SPLIT, label).permutation(members)[:count]] = True
    return images.subset(np.flatnonzero(~aside)), images.subset(np.flatnonzero(aside))


class Batch(NamedTuple):
    """pixels: (N, C, H, W) float32; targets: (N, classes) float32, the probability of each class."""

    pixels: Tensor
    targets: Tensor


class Key(NamedTuple):
    """A picture's place in training: epoch, position in the epoch's order, index in the `ImageSet`."""

    epoch: int
    position: int
    index: int


class EpochSampler:
    """The keys of one process's batches in one epoch: its contiguous part of each batch of all processes.

    Set ``epoch``, and ``first`` (the batch to begin with), before iterating. What does not fill a batch is left out.

    Args:
        length: number of pictures.
        batch_size: of all processes together.
        seed: of the order.
        rank, world: this process and their number.

    Raises:
        ValueError: ``batch_size`` is no multiple of ``world``, or more than ``length``.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        if batch_size % world:
            raise ValueError(f"batch_size is {batch_size}: expected a multiple of {world}, the number of processes")
        if batch_size > length:
            raise ValueError(f"batch_size is {batch_size}: expected at most {length}, the number of training pictures")
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        order = _generator(self.seed, _ORDER, self.epoch).permutation(self.length)
        local = self.batch_size // self.world
        for batch in range(self.first, len(self)):
            start = batch * self.batch_size + self.rank * local
            yield [Key(self.epoch, i, int(order[i])) for i in range(start, start + local)]


class _Pictures(Dataset):
    """Pictures ready for the model; an unreadable one is an error as a value, for the main process to raise."""

    def __init__(self, images: ImageSet, processor: ConvNextImageProcessor, channels: int, kind: str, seed: int):
        self.images, self.processor, self.channels, self.kind, self.seed = images, processor, channels, kind, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key | int) -> tuple[np.ndarray, int, Key] | ValueError:
        if not isinstance(key, Key):
            key = Key(0, key, key)
        try:
            image = self.images.open(key.index, self.channels)
            options = {}
            if self.kind != "none":
                rng = _generator(self.seed, _AUGMENT, key.epoch, key.index)
                image = augment(image, self.kind, edge(self.processor), self.processor.resample, rng)
                options = {"do_resize": False}
            pixels = self.processor(image, **options).pixel_values[0]
        except ValueError as error:
            return error
        return pixels, self.images.labels[key.index], key


class _Collate:
    def __init__(self, classes: int, mixup: float, cutmix: float, seed: int):
        self.classes, self.mixup, self.cutmix, self.seed = classes, mixup, cutmix, seed

    def __call__(self, samples: list[tuple[np.ndarray, int, Key] | ValueError]) -> Batch | ValueError:
        for sample in samples:
            if isinstance(sample, ValueError):
                return sample
        pixels = np.stack([pixels for pixels, _, _ in samples])
        targets = np.eye(self.classes, dtype=np.float32)[[label for _, label, _ in samples]]
        epoch, position, _ = samples[0][2]

        def generator_of_pair(i: int) -> np.random.Generator:
            return _generator(self.seed, _MIX, epoch, position // 2 + i)

        mix_pairs(pixels, targets, self.mixup, self.cutmix, generator_of_pair)
        return Batch(torch.from_numpy(pixels), torch.from_numpy(targets))


def edge(processor: ConvNextImageProcessor) -> int:
    """The side of the squares that ``processor`` makes.

    Raises:
        ValueError: its ``size`` is no ``shortest_edge``.
    """
    side = processor.size.get("shortest_edge")
    if side is None:
        raise ValueError(f"the image processor's size is {processor.size}: expected {{'shortest_edge': …}}")
    return side


def training_loader(
    images: ImageSet,
    processor: ConvNextImageProcessor,
    sampler: EpochSampler,
    *,
    channels: int,
    augmentation: str,
    mixup: float,
    cutmix: float,
    workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Batches for training, in the sampler's order; an unreadable picture comes as a ValueError in a batch's place.

    Raises:
        ValueError: a process's part of the batch is odd, so that it cannot be mixed in pairs.
    """
    local = sampler.batch_size // sampler.world
    if (mixup or cutmix) and local % 2:
        raise ValueError(f"a process's batch is {local}: expected an even number, for mixup and cutmix mix pairs")
    return DataLoader(
        _Pictures(images, processor, channels, augmentation, sampler.seed),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_Collate(len(images.classes), mixup, cutmix, sampler.seed),
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def evaluation_loader(
    images: ImageSet,
    processor: ConvNextImageProcessor,
    *,
    channels: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches for evaluation: every ``world``-th picture from ``rank`` on, through the processor alone."""
    return DataLoader(
        _Pictures(images.subset(range(rank, len(images), world)), processor, channels, "none", 0),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_Collate(len(images.classes), 0.0, 0.0, 0),
        pin_memory=pin_memory,
    )


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)
