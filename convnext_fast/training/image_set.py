"""Labelled images, in folders or in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from ..files import local_path, read_json
from ..images.files import find_images, open_image, to_channels
from .augment import SPLIT, keyed_generator

VALIDATION_FOLDERS = ("val", "validation")
FILES = "pictures.json"
"""In a run's folder: `ImageSet.files` of its training images, to name those that have changed when it is resumed."""


class ImageSet:
    """Images, each with a class.

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
        """Image ``index``, with ``channels`` channels; a ValueError names a file that cannot be read."""
        image = self.pictures[index]
        if isinstance(image, np.ndarray):
            return to_channels(PIL.Image.fromarray(image), channels)
        try:
            return open_image(image, channels)
        except (ValueError, OSError) as error:
            raise ValueError(f"{image}: {error}") from error

    def fingerprint(self) -> dict[str, list[int | str]]:
        """For each class, the number of its images, and a digest of their names and sizes in bytes."""
        digests = [hashlib.sha256() for _ in self.classes]
        counts = [0] * len(self.classes)
        for image, label in zip(self.pictures, self.labels, strict=True):
            counts[label] += 1
            if isinstance(image, np.ndarray):
                digests[label].update(image.tobytes())
            else:
                digests[label].update(f"{image.name}\0{image.stat().st_size}\0".encode(errors="surrogateescape"))
        entries = zip(map(str, self.classes), counts, digests, strict=True)
        return {name: [count, digest.hexdigest()[:16]] for name, count, digest in entries}

    def files(self) -> dict[str, int]:
        """Bytes of each image that is a file, by ``class/name``; an OSError if one has gone."""
        pairs = zip(self.pictures, self.labels, strict=True)
        return {f"{self.classes[i]}/{path.name}": path.stat().st_size for path, i in pairs if isinstance(path, Path)}

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The images at ``indices``."""
        return ImageSet([self.pictures[i] for i in indices], [self.labels[i] for i in indices], self.classes)


def changed_files(run: Path, now: Mapping[str, int]) -> str:
    """Text that names up to five of the files ``now`` (see `ImageSet.files`) that changed since the run began.

    It is empty if the run's folder does not say what they were.
    """
    try:
        before = read_json(run / FILES)
    except (OSError, ValueError):
        return ""
    changed = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    words = [
        f"{name!r} is gone" if name not in now
        else f"{name!r} is new" if name not in before
        else f"{name!r} had {before[name]!r:.20} bytes and has {now[name]}"
        for name in changed[:5]
    ]  # fmt: skip
    return ", ".join(words + [f"{len(changed) - 5} more"] * (len(changed) > 5))


def load_folder(folder: Path, classes: Sequence[str] | None = None) -> ImageSet:
    """The images of a folder that holds ``class name/…/image``.

    ``classes``: the expected names, in order; None takes those of the folders, sorted. A ValueError tells of unknown
    classes, of fewer than two, or of one without an image.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if classes is not None and set(names) - set(classes):
        raise ValueError(f"{folder} has the classes {sorted(set(names) - set(classes))}, which the model does not have")
    if len(names) < 2 and classes is None:
        raise ValueError(f"{folder} has {len(names)} folders: expected one for each class, at least two")
    images, labels = [], []
    for label, name in enumerate(names if classes is None else classes):
        found = find_images(folder / name) if name in names else []
        if not found and classes is None:
            raise ValueError(f"{folder / name} holds no image of a format that is read")
        images += found
        labels += [label] * len(found)
    if not images:
        raise ValueError(f"{folder} holds no image of the classes {', '.join(classes or ())}")
    return ImageSet(images, labels, names if classes is None else classes)


def load_evaluation_folder(source: str | Path, classes: Sequence[str]) -> ImageSet:
    """The images to score a model on: ``val/`` (or ``validation/``) of a folder that has one, else the whole folder.

    ``source`` is laid out as for `load_data`, and may lack some of the model's ``classes``.
    """
    folder = local_path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: expected one with a folder for each class, or 'digits'")
    aside = validation_folder(folder)
    if aside is None and (folder / "train").is_dir():
        raise ValueError(f"{folder} holds train/ but no val/: expected one, or a folder with other images")
    return load_folder(aside or folder, classes)


def validation_folder(folder: Path) -> Path | None:
    """``val/`` or ``validation/`` in ``folder``; None where there is neither."""
    return next((folder / name for name in VALIDATION_FOLDERS if (folder / name).is_dir()), None)


def split(images: ImageSet, holdout: float, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """Hold out the part ``holdout`` of each class, at least one image unless it is 0."""
    if holdout == 0:
        return images, None
    labels, aside = np.array(images.labels), np.zeros(len(images), bool)
    for label, name in enumerate(images.classes):
        members = np.flatnonzero(labels == label)
        count = max(1, round(holdout * len(members)))
        if count >= len(members):
            raise ValueError(f"class {name!r} has {len(members)} images: too few to hold out {holdout:g} of them")
        aside[keyed_generator(seed, SPLIT, label).permutation(members)[:count]] = True
    return images.subset(np.flatnonzero(~aside)), images.subset(np.flatnonzero(aside))
