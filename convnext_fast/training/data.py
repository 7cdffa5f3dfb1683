"""Images to train on, and the batches they come in.

Every random choice is drawn from a generator keyed by (seed, epoch, image or place in the epoch). So a batch does not
depend on how many processes or loader workers there are, nor on whether the run was interrupted before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..files import local_path
from ..images.processor import ConvNextImageProcessor
from .augment import AUGMENT, MIX, ORDER, augment, keyed_generator, mix_pairs
from .digits import load_digits
from .image_set import ImageSet, load_folder, split, validation_folder


def load_data(source: str | Path, holdout: float, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """(training images, images to evaluate on or None).

    Args:
        source: "digits"; or a folder with a folder for each class, or with such folders in ``train/`` and ``val/`` (or
            ``validation/``).
        holdout: without ``val/``, the part of each class that is evaluated on instead of trained on, in [0, 1).
        seed: chooses that part.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: the digits need scikit-learn.
        ValueError: the folder is not laid out as above.
    """
    if str(source) == "digits":
        return split(load_digits()[0], holdout, seed)
    folder = local_path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: expected one with a folder for each class, or 'digits'")
    if not (folder / "train").is_dir():
        aside = validation_folder(folder)
        if aside:
            raise ValueError(f"{folder} holds {aside.name}/ but no train/: expected both, or a folder for each class")
        return split(load_folder(folder), holdout, seed)
    training = load_folder(folder / "train")
    aside = validation_folder(folder)
    return (training, load_folder(aside, training.classes)) if aside else split(training, holdout, seed)


class Batch(NamedTuple):
    """pixels: (N, C, H, W) float32; targets: (N, classes) float32, the probability of each class.

    unreadable: the error of each image that was replaced by another (training) or left out (evaluation).
    """

    pixels: Tensor
    targets: Tensor
    unreadable: tuple[str, ...] = ()


class Sample(NamedTuple):
    """One image of a batch: pixels (C, H, W), None where it is left out; see `Batch`."""

    pixels: np.ndarray | None
    label: int
    key: Key
    unreadable: tuple[str, ...]


class Key(NamedTuple):
    """An image's place in training: epoch, position in the epoch's order, index in the `ImageSet`."""

    epoch: int
    position: int
    index: int


class EpochSampler:
    """The keys of one process's batches in one epoch: a contiguous part of each global batch.

    Set ``epoch``, and ``first`` (the batch to begin with), before iterating. The last incomplete batch is dropped.

    Args:
        length: number of images.
        batch_size: of all processes together.
        seed: of the order.
        rank, world: this process and their number.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``world``, or more than ``length``.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        if batch_size % world:
            raise ValueError(f"batch_size is {batch_size}: expected a multiple of {world}, the number of processes")
        if batch_size > length:
            raise ValueError(
                f"batch_size is {batch_size}: expected at most {length}, the number of training images (--batch-size)"
            )
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        order = keyed_generator(self.seed, ORDER, self.epoch).permutation(self.length)
        local = self.batch_size // self.world
        for batch in range(self.first, len(self)):
            start = batch * self.batch_size + self.rank * local
            yield [Key(self.epoch, i, int(order[i])) for i in range(start, start + local)]


class _ImageDataset(Dataset):
    """Images ready for the model; an unreadable one gives its error as a value, which the main process raises.

    With ``skip``, the next readable image replaces it, so that batches keep their size and do not depend on the number
    of processes. In evaluation it is left out instead.
    """

    def __init__(
        self, images: ImageSet, processor: ConvNextImageProcessor, channels: int, kind: str, seed: int, skip: bool
    ):
        self.images, self.processor, self.channels, self.kind, self.seed = images, processor, channels, kind, seed
        self.skip = skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key | int) -> Sample | ValueError:
        training = isinstance(key, Key)
        if not training:
            key = Key(0, key, key)
        unreadable: list[str] = []
        for ahead in range(len(self) if training else 1):
            index = (key.index + ahead) % len(self)
            try:
                pixels = self._pixels(index, key.epoch)
                return Sample(pixels, self.images.labels[index], key, tuple(unreadable))
            except ValueError as error:
                if not self.skip:
                    return error
                unreadable.append(str(error))
        if training:
            return ValueError(f"no image can be read; the first: {unreadable[0]}")
        return Sample(None, 0, key, tuple(unreadable))

    def _pixels(self, index: int, epoch: int) -> np.ndarray:
        image = self.images.open(index, self.channels)
        options = {}
        if self.kind != "none":
            rng = keyed_generator(self.seed, AUGMENT, epoch, index)
            image = augment(image, self.kind, edge(self.processor), self.processor.resample, rng)
            options = {"do_resize": False}
        return self.processor(image, **options).pixel_values[0]


class _Collate:
    def __init__(self, shape: tuple[int, int, int], classes: int, mixup: float, cutmix: float, seed: int):
        self.classes, self.mixup, self.cutmix, self.seed = classes, mixup, cutmix, seed
        self.nothing = Batch(torch.empty(0, *shape), torch.empty(0, classes))

    def __call__(self, samples: list[Sample | ValueError]) -> Batch | ValueError:
        for sample in samples:
            if isinstance(sample, ValueError):
                return sample
        unreadable = tuple(text for sample in samples for text in sample.unreadable)
        epoch, position, _ = samples[0].key
        samples = [sample for sample in samples if sample.pixels is not None]
        if not samples:
            return self.nothing._replace(unreadable=unreadable)
        pixels = np.stack([sample.pixels for sample in samples])
        targets = np.eye(self.classes, dtype=np.float32)[[sample.label for sample in samples]]

        def generator_of_pair(i: int) -> np.random.Generator:
            return keyed_generator(self.seed, MIX, epoch, position // 2 + i)

        mix_pairs(pixels, targets, self.mixup, self.cutmix, generator_of_pair)
        return Batch(torch.from_numpy(pixels), torch.from_numpy(targets), unreadable)


def batches(loader: DataLoader) -> Iterator[Batch | Exception]:
    """The batches of ``loader``; if a worker dies, the last item is a ChildProcessError."""
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            fault = dead_worker(error)
            if fault is None:
                raise
            yield fault
            return
        yield batch


def dead_worker(error: Exception) -> ChildProcessError | None:
    """The ChildProcessError for an error of PyTorch's loader whose worker died; None for another error.

    PyTorch raises a RuntimeError from a signal handler, wherever the program is at the time. If a batch was being
    handed over, the connection breaks first. File errors never mean an image here: those are ValueErrors.
    """
    if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
        return None
    return ChildProcessError(f"a process that loads images died; it may have run out of memory ({error})")


def edge(processor: ConvNextImageProcessor) -> int:
    """The side of the squares that ``processor`` makes."""
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
    skip_unreadable: bool = False,
) -> DataLoader:
    """Batches for training, in the sampler's order; an unreadable image gives a ValueError in place of its batch.

    With ``skip_unreadable``, the next image replaces it, and the batch reports it.
    """
    local, side = sampler.batch_size // sampler.world, edge(processor)
    if (mixup or cutmix) and local % 2:
        raise ValueError(f"a process's batch is {local}: expected an even number, because mixup and cutmix mix pairs")
    return DataLoader(
        _ImageDataset(images, processor, channels, augmentation, sampler.seed, skip_unreadable),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_Collate((channels, side, side), len(images.classes), mixup, cutmix, sampler.seed),
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
    skip_unreadable: bool = False,
) -> DataLoader:
    """Batches for evaluation: every ``world``-th image from ``rank`` on, through the processor alone.

    An unreadable image gives a ValueError in place of its batch; with ``skip_unreadable`` it is left out.
    """
    side = edge(processor)
    return DataLoader(
        _ImageDataset(images.subset(range(rank, len(images), world)), processor, channels, "none", 0, skip_unreadable),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_Collate((channels, side, side), len(images.classes), 0.0, 0.0, 0),
        pin_memory=pin_memory,
    )
