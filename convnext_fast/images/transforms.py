"""Steps from an image to model input, on pillow and numpy: read, resize, centre crop, rescale and normalise.

Between the steps an image is either an 8-bit PIL image (mode L, LA, RGB or RGBA) or an array (channels, height,
width). Every step gives the values of transformers' PIL processor, bit for bit, in one pass over float32 memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

Image = PIL.Image.Image | np.ndarray

CHANNELS_FIRST = "channels_first"
CHANNELS_LAST = "channels_last"
_CHANNEL_COUNTS = (1, 3, 4)
_BYTE_MODES = ("L", "LA", "RGB", "RGBA")
_COLOUR_MODES = ("YCbCr", "HSV", "LAB")
_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def flatten_images(images: Any, where: str = "images", depth: int = 0) -> list[Any]:
    """A list of single images from one image, a batch (an array or tensor of 4 dimensions), or a list of those.

    A string, the place of an image, counts as one. A list may hold lists, one level deep, which are joined in order.
    ``where``: what an error message calls the images; ``depth``: the lists around them.
    """
    if isinstance(images, (list, tuple)):
        if depth == 2:
            raise ValueError(f"{where} is a {type(images).__name__}: lists of images nest at most one level deep")
        flat = [image for i, item in enumerate(images) for image in flatten_images(item, f"{where}[{i}]", depth + 1)]
    elif isinstance(images, (PIL.Image.Image, str)):
        return [images]
    elif not isinstance(images, (np.ndarray, torch.Tensor)):
        raise TypeError(
            f"{where} is a {type(images).__name__}: expected a PIL image, a numpy array, a torch tensor or a string"
        )
    elif images.ndim in (2, 3, 4):
        flat = list(images) if images.ndim == 4 else [images]
    else:
        raise ValueError(
            f"{where} has shape {tuple(images.shape)}: expected (height, width), an image with a channel axis, "
            "or a batch of those"
        )
    if not flat and not depth:
        raise ValueError("images is empty: expected at least one image")
    return flat


def read_image(image: Any, where: str, input_data_format: str | None = None, to_rgb: bool = False) -> Image:
    """``image`` as an 8-bit PIL image in mode L, LA, RGB or RGBA, or as an array (channels, height, width).

    Args:
        image, input_data_format: see `ConvNextImageProcessor.preprocess`; None infers the channel axis of a 3-D array
            from its length, 1, 3 or 4. Where both ends would do, the first axis is taken, with a warning.
        where: what an error message calls the image.
        to_rgb: convert to three channels; transparency is laid over white.
    """
    if isinstance(image, PIL.Image.Image):
        return _read_pil(image, where, to_rgb)
    if isinstance(image, torch.Tensor):
        # numpy has no bfloat16; float32 holds every bfloat16 value.
        image = (image.float() if image.dtype == torch.bfloat16 else image).detach().cpu().numpy()
    array = image
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise ValueError(f"{where} has dtype {array.dtype}: expected booleans, integers, or floats of at most 64 bits")
    if array.size == 0:
        raise ValueError(f"{where} has shape {array.shape}: expected at least one pixel")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 2:
        array = array[None]
    elif (input_data_format or infer_data_format(array.shape, where)) == CHANNELS_LAST:
        array = array.transpose(2, 0, 1)
    return _array_to_rgb(array, where) if to_rgb else array


def _read_pil(image: PIL.Image.Image, where: str, to_rgb: bool) -> Image:
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{where} cannot be decoded: {error}") from error
    if 0 in image.size:
        raise ValueError(f"{where} is {image.width}×{image.height} pixels: expected at least one pixel")
    if to_rgb:
        try:
            if not image.has_transparency_data:
                return image if image.mode == "RGB" else image.convert("RGB")
            return over_white(image).convert("RGB")
        except ValueError as error:
            raise ValueError(
                f"{where} has PIL mode {image.mode!r}, which pillow cannot turn into RGB: {error}"
            ) from None
    if image.mode in _COLOUR_MODES:  # their channels are not converted
        return PIL.Image.fromarray(np.asarray(image))
    if image.mode in _WIDE_MODES:
        return read_image(np.asarray(image), where)
    if image.mode not in _BYTE_MODES:
        allowed = ", ".join(_BYTE_MODES + _COLOUR_MODES + _WIDE_MODES)
        raise ValueError(
            f"{where} has PIL mode {image.mode!r}: expected one of {allowed}; do_convert_rgb=True converts it"
        )
    return image


def over_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image with transparency laid over white, in mode RGBA."""
    image = image.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (255, 255, 255, 255)), image)


def _array_to_rgb(array: np.ndarray, where: str) -> np.ndarray:
    if array.shape[0] == 1:
        return np.repeat(array, 3, axis=0)
    if array.shape[0] != 4:
        return array
    whole = array.dtype.kind in "ui"
    if array.dtype.kind == "f" and not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"{where} is RGBA in {array.dtype} with values from {array.min()} to {array.max()}: "
            "expected [0, 1] for floats, or integers from 0 to 255"
        )
    white = 255 if whole else 1.0
    alpha = array[3:] / white
    blended = alpha * array[:3] + (1 - alpha) * white
    return (np.round(blended) if whole else blended).astype(array.dtype)


def infer_data_format(shape: Sequence[int], where: str) -> str:
    """Where the channels of an image of three dimensions are, by their number: 1, 3 or 4."""
    first, last = shape[0] in _CHANNEL_COUNTS, shape[2] in _CHANNEL_COUNTS
    if first and last:
        warnings.warn(
            f"{where} has shape {tuple(shape)}, so its channels could be on either end: the first axis is used; "
            "pass input_data_format to choose",
            stacklevel=2,
        )
    if not first and not last:
        raise ValueError(
            f"{where} has shape {tuple(shape)}: expected 1, 3 or 4 channels on the first or last axis, "
            "or input_data_format to say where they are"
        )
    return CHANNELS_FIRST if first else CHANNELS_LAST


def image_size(image: Image) -> tuple[int, int]:
    """(height, width) in pixels."""
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    return image.shape[1], image.shape[2]


def shortest_edge_size(height: int, width: int, shortest_edge: int) -> tuple[int, int]:
    """(height, width) with the same shape whose shorter side is ``shortest_edge``; the longer one is rounded down."""
    longest_edge = int(shortest_edge * max(height, width) / min(height, width))
    return (longest_edge, shortest_edge) if width <= height else (shortest_edge, longest_edge)


def resize(image: Image, size: tuple[int, int], resample: int, where: str) -> tuple[PIL.Image.Image, bool]:
    """``image`` resampled to ``size`` (height, width), in 8 bits, and whether its values were in [0, 1].

    Pillow resamples 8-bit samples. An array of fractions is multiplied by 255 and truncated first; the caller has to
    divide by 255 afterwards.
    """
    image, fractions = (image, False) if isinstance(image, PIL.Image.Image) else _array_to_pil(image, where)
    return image.resize((size[1], size[0]), resample=resample), fractions


def _array_to_pil(array: np.ndarray, where: str) -> tuple[PIL.Image.Image, bool]:
    if array.shape[0] > 4:
        raise ValueError(f"{where} has {array.shape[0]} channels: expected 1 to 4 for an image to resize")
    fractions = False
    if array.dtype != np.uint8:
        low, high = array.min(), array.max()
        in_bytes = low >= 0 and high <= 255
        # Whole numbers up to the tolerance of numpy.allclose, which is where transformers draws the line.
        whole = in_bytes and (array.dtype.kind != "f" or np.allclose(array, array.astype(np.int64)))
        fractions = bool(not whole and in_bytes and high <= 1)
        if not whole and not fractions:
            raise ValueError(
                f"{where} has values from {low} to {high}: an image to resize holds whole numbers in [0, 255] "
                "or fractions in [0, 1]"
            )
        array = (_scaled(array, 255.0) if fractions else array).astype(np.uint8)
    samples = array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
    return PIL.Image.fromarray(samples), fractions


def center_crop(image: Image, size: tuple[int, int]) -> Image:
    """The middle (height, width) = ``size`` of ``image``, with zeros around it where it is smaller than that."""
    (height, width), (crop_height, crop_width) = image_size(image), size
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    if isinstance(image, PIL.Image.Image):
        return image.crop((left, top, left + crop_width, top + crop_height))
    inside = image[:, max(top, 0) :, max(left, 0) :][:, :crop_height, :crop_width]
    if inside.shape[1:] == size:
        return inside
    out = np.zeros((image.shape[0], crop_height, crop_width), image.dtype)
    out[:, max(-top, 0) :, max(-left, 0) :][:, : inside.shape[1], : inside.shape[2]] = inside
    return out


def to_array(image: Image) -> np.ndarray:
    """``image`` as an array (channels, height, width); a read-only view of a PIL image's bytes."""
    if isinstance(image, np.ndarray):
        return image
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def output_dtype(dtype: np.dtype, rescaled: bool, normalized: bool) -> np.dtype:
    """The dtype of `rescale_and_normalize`: float32 if rescaled; otherwise normalising keeps a floating dtype."""
    if rescaled or (normalized and dtype.kind != "f"):
        return np.dtype(np.float32)
    return dtype


def rescale_and_normalize(
    array: np.ndarray,
    factors: Sequence[float],
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    out: np.ndarray,
) -> None:
    """``out`` = (``array`` · factors − mean) / std, channel by channel; ``mean`` None leaves the last two steps out.

    array, out: (channels, height, width) of any strides, computed in `output_dtype`. The factors are applied one after
    the other, each product rounded to float32.
    """
    dtype = output_dtype(array.dtype, bool(factors), mean is not None)
    work = out if out.dtype == dtype else np.empty(array.shape, dtype)
    if factors:
        _scaled(array, factors[0], work)
        for factor in factors[1:]:
            _scaled(work, factor, work)
    else:
        work[...] = array
    if mean is not None:
        np.subtract(work, _per_channel(mean, dtype), out=work)
        np.divide(work, _per_channel(std, dtype), out=work)
    if work is not out:
        out[...] = work


def _scaled(array: np.ndarray, factor: float, out: np.ndarray | None = None) -> np.ndarray:
    # The product is taken in float64 and rounded once; numpy converts in cache-sized pieces, so no float64 copy exists.
    out = np.empty(array.shape, np.float32) if out is None else out
    return np.multiply(array, factor, out=out, dtype=np.float64, casting="same_kind")


def _per_channel(values: float | Sequence[float] | None, dtype: np.dtype) -> np.ndarray:
    return np.asarray(values, dtype=dtype).reshape(-1, 1, 1)
