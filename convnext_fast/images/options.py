"""The image processor's options: their types, defaults and checks."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import PIL.Image
import torch

from ..config import MOST_SIDE
from ..config.checks import device, one_of, real
from .batch_feature import FRAMEWORKS
from .transforms import CHANNELS_FIRST, CHANNELS_LAST

_SIZE_KEYS = (
    {"shortest_edge"},
    {"height", "width"},
    {"shortest_edge", "longest_edge"},
    {"longest_edge"},
    {"max_height", "max_width"},
    {"min_pixels", "max_pixels"},
)


class ImageOptions(TypedDict, total=False):
    """Options of `ConvNextImageProcessor` and of its calls; None means the default, or the processor's own.

    Attributes:
        do_resize: resize to ``size`` (default True).
        size: the output's side as an integer or ``{"shortest_edge": side}`` (default 384). Below 384 the shorter side
            becomes ``int(side / crop_pct)`` and the middle square is cropped; from 384 on the image is warped to a
            square. Other keys of transformers are kept, but only ``shortest_edge`` resizes.
        crop_pct: see ``size`` (default 224 / 256).
        resample: a ``PIL.Image.Resampling``, its number or its name (default bicubic).
        do_center_crop, crop_size: crop the middle to an integer, (height, width) or ``{"height": …, "width": …}``,
            with zeros around a smaller image (default: no).
        do_rescale, rescale_factor: multiply the values (default True and 1 / 255). An array of fractions in [0, 1]
            is multiplied too, as in transformers: pass ``do_rescale=False`` for it.
        do_normalize, image_mean, image_std: subtract and divide (default True and 0.5), numbers or one per channel.
        do_convert_rgb: convert to RGB first, transparency over white (default: no).
        return_tensors: None for a list of numpy arrays, one for each image; "np", "pt", "jax" or "tf" for one batch.
        data_format: "channels_first" or "channels_last", of the output (default "channels_first").
        input_data_format: the same, of 3-D input arrays; None infers it from their shape.
        device: of the batch, with ``return_tensors="pt"`` (default: the CPU).
    """

    do_resize: bool | None
    size: int | Sequence[int] | Mapping[str, int] | None
    crop_pct: float | None
    resample: PIL.Image.Resampling | int | str | None
    do_center_crop: bool | None
    crop_size: int | Sequence[int] | Mapping[str, int] | None
    do_rescale: bool | None
    rescale_factor: float | None
    do_normalize: bool | None
    image_mean: float | Sequence[float] | None
    image_std: float | Sequence[float] | None
    do_convert_rgb: bool | None
    return_tensors: str | None
    data_format: str | None
    input_data_format: str | None
    device: torch.device | str | None


_WITHOUT_EFFECT = {"default_to_square", "disable_grouping", "image_seq_length"}
"""Options of transformers that change nothing here."""
_NOT_SERVED = {"do_pad", "pad_size"}
"""Others, which must not be set."""


def check_option(name: str, value: Any) -> Any:
    """``value`` of the option ``name`` in its canonical form: sizes as dictionaries, numbers as floats; None stays."""
    return None if value is None else _OPTIONS[name][0](name, value)


def check_names(options: Mapping[str, Any]) -> None:
    """Raise an error for the first of ``options`` that is unknown or not supported."""
    for name, value in options.items():
        if name in _NOT_SERVED and value:
            raise ValueError(f"{name} is {value!r}: this processor does not pad")
        if name not in _OPTIONS and name not in _WITHOUT_EFFECT | _NOT_SERVED:
            raise TypeError(f"unknown option {name!r}: expected one of {', '.join(_OPTIONS)}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}: expected True or False")
    return bool(value)


def _number(name: str, value: Any, positive: bool = False) -> float:
    allowed = "a positive number" if positive else "a finite number"
    value = real(name, value, allowed=allowed)
    if positive and value <= 0:
        raise ValueError(f"{name} is {value}: expected {allowed}")
    return value


_positive = functools.partial(_number, positive=True)


def _per_channel(name: str, value: Any) -> float | list[float]:
    check = _positive if name == "image_std" else _number
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return check(name, value)
    if not value:
        raise ValueError(f"{name} is empty: expected a number, or one for each channel")
    return [check(f"{name}[{i}]", item) for i, item in enumerate(value)]


def _size(name: str, value: Any) -> dict[str, int]:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r}: expected an integer, two as (height, width), or a dictionary of sizes")
    if set(value) not in _SIZE_KEYS:
        allowed = ", ".join("{" + ", ".join(sorted(keys)) + "}" for keys in _SIZE_KEYS)
        raise ValueError(f"{name} has the keys {sorted(map(str, value))}: expected one of {allowed}")
    for key, item in value.items():
        integral = isinstance(item, numbers.Integral) and not isinstance(item, bool)
        if not integral or item < 1:
            raise (ValueError if integral else TypeError)(f"{name}[{key!r}] is {item!r}: expected a positive integer")
        if item > MOST_SIDE and key not in ("min_pixels", "max_pixels"):
            raise ValueError(f"{name}[{key!r}] is too large: expected at most {MOST_SIDE:,} pixels")
    return {key: int(item) for key, item in value.items()}


def _resample(name: str, value: Any) -> PIL.Image.Resampling:
    allowed = ", ".join(f"{filter.value} ({filter.name})" for filter in sorted(PIL.Image.Resampling))
    if isinstance(value, str) and value.upper() in PIL.Image.Resampling.__members__:
        return PIL.Image.Resampling[value.upper()]
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}: expected a PIL.Image.Resampling or its number: {allowed}")
    try:
        return PIL.Image.Resampling(int(value))
    except ValueError:
        raise ValueError(f"{name} is {value}: expected a PIL.Image.Resampling or its number: {allowed}") from None


def _one_of(*allowed: str) -> Callable[[str, Any], str]:
    # Enumerations of strings, such as transformers' ChannelDimension and TensorType, carry the string as value.
    return lambda name, value: one_of(name, getattr(value, "value", value), allowed)


_LAYOUT = _one_of(CHANNELS_FIRST, CHANNELS_LAST)
_OPTIONS: dict[str, tuple[Callable[[str, Any], Any], Any]] = {
    "do_resize": (_flag, True),
    "size": (_size, {"shortest_edge": 384}),
    "crop_pct": (_positive, 224 / 256),
    "resample": (_resample, PIL.Image.Resampling.BICUBIC),
    "do_center_crop": (_flag, None),
    "crop_size": (_size, None),
    "do_rescale": (_flag, True),
    "rescale_factor": (_number, 1 / 255),
    "do_normalize": (_flag, True),
    "image_mean": (_per_channel, [0.5, 0.5, 0.5]),
    "image_std": (_per_channel, [0.5, 0.5, 0.5]),
    "do_convert_rgb": (_flag, None),
    "return_tensors": (_one_of(*FRAMEWORKS), None),
    "data_format": (_LAYOUT, None),
    "input_data_format": (_LAYOUT, None),
    "device": (device, None),
}
"""The check of each option, and its default."""
DEFAULTS = {name: default for name, (_, default) in _OPTIONS.items()}
"""Every option with its default; None means unset."""
