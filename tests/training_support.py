"""A small model and small pictures to train it on."""

import numpy as np
import PIL.Image

from convnext_fast import ConvNextConfig
from convnext_fast.image_processor import ConvNextImageProcessor
from convnext_fast.training import ImageSet


def tiny_config(**fields):
    sizes = {"num_channels": 1, "patch_size": 2, "num_stages": 2, "depths": (1, 2), "hidden_sizes": (8, 16)}
    return ConvNextConfig(**{**sizes, "image_size": 8, "num_labels": 2, "layer_scale_init_value": 0.5, **fields})


def pictures(count=24, side=8, classes=("dark", "light")):
    rng = np.random.default_rng(0)
    labels = [i % len(classes) for i in range(count)]
    images = [rng.integers(0, 100, (side, side), np.uint8) + np.uint8(100 * label) for label in labels]
    return ImageSet(images, labels, classes)


def processor(side=8):
    return ConvNextImageProcessor(size=side, crop_pct=1.0, image_mean=[0.5], image_std=[0.5])


def write_folder(folder, count=20):
    """The pictures as files, in a folder for each class."""
    images = pictures(count)
    for i, (array, label) in enumerate(zip(images.pictures, images.labels, strict=True)):
        path = folder / images.classes[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(array).save(path)
    return folder
