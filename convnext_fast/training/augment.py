"""Random changes of training images, each a pure function of a generator that the caller seeds.

`augment` works on one image, `mix_pairs` on a batch: mixup ("mixup: Beyond Empirical Risk Minimization") and cutmix
("CutMix: Regularization Strategy to Train Strong Classifiers").
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import PIL.Image

ORDER, AUGMENT, MIX, SPLIT = range(4)
"""What random numbers are drawn for; the second part of a generator's key."""
AUGMENTATIONS = ("crop", "affine", "none")
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
ROTATION, SHEAR, ZOOM, SHIFT = math.radians(12), 0.15, 0.12, 0.1
"""Limits of "affine": radians, slope, part of the size, part of the size."""


def keyed_generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on the key alone."""
    return np.random.default_rng(key)


def augment(
    image: PIL.Image.Image, kind: str, size: int, resample: PIL.Image.Resampling, rng: np.random.Generator
) -> PIL.Image.Image:
    """``image`` as a square of side ``size``, changed at random.

    "crop" cuts out 8 to 100 % of the area and mirrors half of the images (as the paper does); "affine" rotates,
    shears, zooms and shifts slightly (for characters, whose mirror images would be wrong).
    """
    if kind == "affine":
        return _affine(image.resize((size, size), resample), rng)
    box = _crop_box(image.width, image.height, rng)
    image = image.resize((size, size), resample, box=box)
    return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A rectangle of random area and aspect inside the image; its central square if ten draws do not fit."""
    for _ in range(10):
        area = rng.uniform(*CROP_AREA) * width * height
        aspect = math.exp(rng.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        w, h = max(1.0, math.sqrt(area * aspect)), max(1.0, math.sqrt(area / aspect))
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _affine(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    angle = rng.uniform(-ROTATION, ROTATION)
    shear = rng.uniform(-SHEAR, SHEAR)
    zoom = rng.uniform(1 - ZOOM, 1 + ZOOM, 2)
    shift = rng.uniform(-SHIFT, SHIFT, 2) * image.size
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag(zoom)
    # Pillow needs the map from output to input; the middle is only shifted.
    middle = np.array(image.size) / 2
    offset = middle - matrix @ (middle + shift)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    return image.transform(image.size, PIL.Image.Transform.AFFINE, coefficients, PIL.Image.Resampling.BICUBIC)


def mix_pairs(
    pixels: np.ndarray,
    targets: np.ndarray,
    mixup: float,
    cutmix: float,
    generator_of_pair: Callable[[int], np.random.Generator],
) -> None:
    """Mix the images 2i and 2i + 1 with each other, in place.

    Neighbours are mixed, so that a batch split evenly between processes is mixed as the whole batch would be.

    Args:
        pixels, targets: (N, C, H, W), N even, and (N, classes), the probability of each class.
        mixup, cutmix: α of the Beta(α, α) from which the share λ of an image in its own mixture is drawn; 0 turns one
            off, and with both on each pair takes one at random.
        generator_of_pair: the source of randomness of pair i.
    """
    if not (mixup or cutmix):
        return
    for i in range(len(pixels) // 2):
        rng = generator_of_pair(i)
        pair = slice(2 * i, 2 * i + 2)
        cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
        share = rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup)
        if cut:
            rows, columns = _cut_box(pixels.shape[2], pixels.shape[3], 1 - share, rng)
            box = pixels[pair, :, rows, columns]
            box[...] = box[::-1].copy()
            share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / math.prod(pixels.shape[2:])
        else:
            pixels[pair] = share * pixels[pair] + (1 - share) * pixels[pair][::-1]
        targets[pair] = share * targets[pair] + (1 - share) * targets[pair][::-1]


def _cut_box(height: int, width: int, area: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a box with the image's shape and the part ``area`` of its area, cut off at the border."""
    half_h, half_w = height * math.sqrt(area) / 2, width * math.sqrt(area) / 2
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    top, bottom = round(max(y - half_h, 0)), round(min(y + half_h, height))
    left, right = round(max(x - half_w, 0)), round(min(x + half_w, width))
    return slice(top, bottom), slice(left, right)
