"""Scikit-learn's handwritten digits: 1,797 real 8×8 images, a fixed split, and the small model they train.

The images are the test part of the UCI "Optical Recognition of Handwritten Digits" data, by 13 writers. Of each
digit every third image, in the order of the file, is held out: no training run sees it, and only the demo scores it.
"""

from __future__ import annotations

import numpy as np

from ..config import ConvNextConfig
from ..console import needing
from ..images.processor import ConvNextImageProcessor
from .image_set import ImageSet

CLASSES = tuple(str(digit) for digit in range(10))
EVERY = 3
"""Of each digit, every third image is held out."""


def load_digits() -> tuple[ImageSet, ImageSet]:
    """(training images, held-out images), 8×8 grey with white strokes."""
    with needing("the digits need scikit-learn", "demo"):
        from sklearn.datasets import load_digits as load
    data = load()
    # Samples are 0 to 16.
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target
    held_out = np.zeros(len(labels), bool)
    for digit in range(len(CLASSES)):
        held_out[np.flatnonzero(labels == digit)[EVERY - 1 :: EVERY]] = True
    training, rest = (ImageSet(list(images[part]), labels[part].tolist(), CLASSES) for part in (~held_out, held_out))
    return training, rest


def digits_config() -> ConvNextConfig:
    """The demo's architecture: three stages on 8×8, 4×4 and 2×2 positions."""
    return ConvNextConfig(
        num_channels=1,
        image_size=16,
        patch_size=2,
        num_stages=3,
        depths=(2, 2, 2),
        hidden_sizes=(32, 64, 96),
        layer_scale_init_value=0.1,
        layer_norm_eps=1e-6,
        id2label=dict(enumerate(CLASSES)),
    )


def digits_processor() -> ConvNextImageProcessor:
    """Images of any size, grey, to 16×16 in [−1, 1]."""
    return ConvNextImageProcessor(size=16, crop_pct=1.0, image_mean=[0.5], image_std=[0.5])
