"""The image processor of a checkpoint, or the usual one if it has none."""

from __future__ import annotations

from pathlib import Path

from ..config import ConvNextConfig
from .processor import ConvNextImageProcessor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def default_processor(config: ConvNextConfig) -> ConvNextImageProcessor:
    """The preprocessing that ImageNet models are trained with: ``image_size`` after a crop of 7/8, its mean and std.

    Models with another number of channels than three get a mean and std of 0.5.
    """
    size, width = config.image_shape
    if size != width:
        raise ValueError(f"image_size is {config.image_size}: expected a square for an image processor")
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if config.num_channels == 3 else (0.5, 0.5)
    return ConvNextImageProcessor(size=size, image_mean=mean, image_std=std)


def load_processor(source: str | Path, config: ConvNextConfig) -> tuple[ConvNextImageProcessor, bool]:
    """(the processor of a folder or hub id, or else `default_processor`; whether it has its own)."""
    if Path(source).is_file():
        return default_processor(config), False
    try:
        return ConvNextImageProcessor.from_pretrained(source), True
    except FileNotFoundError:
        return default_processor(config), False
