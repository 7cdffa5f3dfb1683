"""`ConvNextImageProcessor`: from images to ``pixel_values``, with the pixels of transformers' PIL processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from ..config import MOST_SIDE
from . import transforms
from .batch_feature import BatchFeature, to_framework
from .files import fetch_image
from .options import DEFAULTS, ImageOptions, check_names, check_option
from .saved_processor import TYPES, SavedProcessor
from .transforms import CHANNELS_LAST, Image

if TYPE_CHECKING:
    from typing_extensions import Unpack

WARP_EDGE = 384
"""From this size on an image is warped to a square; below it is resized by ``crop_pct`` and cropped."""
_NEEDS = {
    "do_resize": ("size", "crop_pct", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}
MOST_PIXELS = 1 << 26
"""Of a resized or cropped image: 0.8 GB in float32. A narrow one, sized by its shorter edge, could have far more."""


class ConvNextImageProcessor(SavedProcessor):
    """Prepares images for a ConvNeXt: resize and crop, rescale, normalise.

    The pixels equal those of transformers' ``ConvNextImageProcessorPil``. Every option of `ImageOptions` is an
    attribute and may be assigned; values are checked at construction and at each call.

    Args:
        **options: see `ImageOptions`. Other keys are kept in ``extra``, and `save_pretrained` writes them.

    Raises:
        TypeError, ValueError: an option has the wrong type or value; the message names it and what is allowed.
    """

    model_input_names = ("pixel_values",)
    valid_kwargs = ImageOptions

    do_resize: bool
    size: dict[str, int]
    crop_pct: float
    resample: PIL.Image.Resampling
    do_center_crop: bool | None
    crop_size: dict[str, int] | None
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float]
    image_std: float | list[float]
    do_convert_rgb: bool | None
    return_tensors: str | None
    data_format: str | None
    input_data_format: str | None
    device: torch.device | None

    def __init__(self, /, **options: Unpack[ImageOptions]):
        extra: dict[str, Any] = {name: value for name, value in options.items() if name not in DEFAULTS}
        old_type = extra.pop("feature_extractor_type", None)
        kind = extra.pop("image_processor_type", None) or old_type or TYPES[0]
        extra.pop("processor_class", None)
        if kind not in TYPES:
            raise ValueError(f"image_processor_type is {kind!r}: expected one of {', '.join(TYPES)}")
        for name, default in DEFAULTS.items():
            value = options.get(name)
            setattr(self, name, check_option(name, default if value is None else value))
        self.extra = extra

    def __call__(self, images: Any, **options: Unpack[ImageOptions]) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(images, **options)

    def preprocess(self, images: Any, **options: Unpack[ImageOptions]) -> BatchFeature:
        """``pixel_values`` of one image or many, floating point if rescaled or normalised.

        Args:
            images: a PIL image; a numpy array or torch tensor, (height, width), (channels, height, width) or
                (height, width, channels), or a batch of the latter two in 4 dimensions; or a list of any of those, or
                of lists of them. Values are 0 to 255. A string is the path, the URL or the base64 text of an image
                file, which is read in RGB.
            **options: see `ImageOptions`; they replace the processor's own for this call.

        Returns:
            `BatchFeature` with ``pixel_values``: (batch, channels, height, width), or channels last; without
            ``return_tensors`` a list with one array per image.

        Raises:
            TypeError: an option is unknown, or something is not an image.
            ValueError: an option has a wrong value, an image cannot be processed (the message says which and why), or
                the images of a batch have different sizes.
            OSError: a string's image cannot be fetched or read.
            ImportError: ``return_tensors`` asks for a framework that is not installed.
        """
        values = self._resolve(options)
        arrays, factors = [], []
        for i, image in enumerate(transforms.flatten_images(images)):
            where = f"image {i}"
            image = _fetched(image, where) if isinstance(image, str) else image
            image = transforms.read_image(image, where, values["input_data_format"], bool(values["do_convert_rgb"]))
            image, fractions = self._shape(image, values, where)
            array = transforms.to_array(image)
            if values["do_normalize"]:
                _check_channels(array.shape[0], values, where)
            arrays.append(array)
            by = [(fractions, 1 / 255), (values["do_rescale"], values["rescale_factor"])]
            factors.append([factor for applies, factor in by if applies])

        mean, std = (values["image_mean"], values["image_std"]) if values["do_normalize"] else (None, None)
        dtypes = [
            transforms.output_dtype(array.dtype, bool(by), mean is not None)
            for array, by in zip(arrays, factors, strict=True)
        ]
        outputs = _allocate([array.shape for array in arrays], dtypes, values)
        last = values["data_format"] == CHANNELS_LAST
        for array, by, output in zip(arrays, factors, outputs, strict=True):
            transforms.rescale_and_normalize(array, by, mean, std, output.transpose(2, 0, 1) if last else output)
        framework, device = values["return_tensors"], values["device"]
        if device is not None and framework != "pt":
            raise ValueError(f"device is {device}, return_tensors {framework!r}: expected 'pt', for tensors of PyTorch")
        batch = outputs if framework is None else to_framework(outputs, framework)
        return BatchFeature(pixel_values=batch if device is None else batch.to(device))

    def _resolve(self, options: ImageOptions) -> dict[str, Any]:
        check_names(options)
        values: dict[str, Any] = {}
        for name in DEFAULTS:
            value = options.get(name)
            values[name] = check_option(name, getattr(self, name) if value is None else value)
        for step, needed in _NEEDS.items():
            missing = [name for name in needed if values[step] and values[name] is None]
            if missing:
                raise ValueError(f"{missing[0]} is None: {step}=True needs it")
        return values

    @staticmethod
    def _shape(image: Image, values: Mapping[str, Any], where: str) -> tuple[Image, bool]:
        fractions = False
        if values["do_resize"]:
            side = values["size"].get("shortest_edge")
            if side is None:
                raise ValueError(f"size is {values['size']}: expected an integer or {{'shortest_edge': …}} to resize")
            target = (side, side)
            if side < WARP_EDGE:
                edge = side / values["crop_pct"]
                if not 1 <= edge <= MOST_SIDE:
                    raise ValueError(
                        f"crop_pct is {values['crop_pct']}: with size {side} it resizes to {edge:.3g} pixels, expected "
                        f"1 to {MOST_SIDE:,}"
                    )
                target = transforms.shortest_edge_size(*transforms.image_size(image), int(edge))
            _check_pixels(target, f"{where} would be resized to")
            image, fractions = transforms.resize(image, target, values["resample"], where)
            if side < WARP_EDGE:
                image = transforms.center_crop(image, (side, side))
        if values["do_center_crop"]:
            crop = values["crop_size"]
            if "height" not in crop:
                raise ValueError(f"crop_size is {crop}: expected an integer or {{'height': …, 'width': …}}")
            target = crop["height"], crop["width"]
            _check_pixels(target, "crop_size is")
            image = transforms.center_crop(image, target)
        return image, fractions


ConvNextFeatureExtractor = ConvNextImageProcessor
"""The class's older name, which older checkpoints and scripts use."""
ConvNextImageProcessorKwargs = ImageOptions
"""transformers' name of the options; its own tests look for it in this module."""


def _fetched(source: str, where: str) -> PIL.Image.Image:
    try:
        return fetch_image(source)
    except (ValueError, OSError) as error:
        raise (ValueError if isinstance(error, ValueError) else OSError)(f"{where}: {error}") from error


def _check_pixels(size: tuple[int, int], where: str) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"{where} {size[0]}×{size[1]} pixels: expected at most {MOST_PIXELS:,}")


def _check_channels(channels: int, values: Mapping[str, Any], where: str) -> None:
    for name in ("image_mean", "image_std"):
        if isinstance(values[name], list) and len(values[name]) != channels:
            raise ValueError(
                f"{where} has {channels} channel(s) but {name} has {len(values[name])} values: expected one number, "
                "or one for each channel (do_convert_rgb=True converts any image to three)"
            )


def _allocate(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype], values: Mapping[str, Any]
) -> np.ndarray | list[np.ndarray]:
    if values["data_format"] == CHANNELS_LAST:
        shapes = [(height, width, channels) for channels, height, width in shapes]
    if values["return_tensors"] is None:
        return list(map(np.empty, shapes, dtypes))
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"image {i} comes out with shape {shape} and image 0 with {shapes[0]}: expected one shape for a batch; "
                "resize, or leave return_tensors None"
            )
    return np.empty((len(shapes), *shapes[0]), np.result_type(*dtypes))
