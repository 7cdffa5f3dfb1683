"""Image files: finding them in a folder, and decoding one for a model."""

from __future__ import annotations

import base64
import http.client
import io
import os
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import PIL.ImageOps

from .transforms import over_white

PIL.Image.init()
_RASTERS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PCX PNG PPM QOI SGI TGA TIFF WEBP"
FORMATS = tuple(name for name in _RASTERS.split() if name in PIL.Image.OPEN)
"""The formats that are read, by pillow's names, whatever the file is called: raster formats that this pillow
supports. For others pillow starts programs (Ghostscript for EPS) or can hardly read them."""
MOST_BYTES = 1 << 30
"""Largest image file."""
_TIMEOUT = 60
"""Seconds that a server may take to answer."""
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def is_image_file(path: Path) -> bool:
    """Whether ``path`` is a file, not hidden, whose suffix is one of the formats that are read."""
    read = PIL.Image.registered_extensions().get(path.suffix.lower()) in FORMATS
    return read and not path.name.startswith(".") and path.is_file()


def _fail(error: OSError) -> None:
    raise error


def find_images(folder: Path, on_error: Callable[[OSError], None] = _fail) -> list[Path]:
    """Every image file in ``folder`` and below, sorted by path, except in hidden or linked folders.

    ``on_error`` gets the error of each folder that cannot be read, which is then skipped; by default it is raised.
    """
    found = []
    for place, folders, names in os.walk(folder, onerror=on_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [path for path in (Path(place, name) for name in names) if is_image_file(path)]
    return sorted(found)


def fetch_image(source: str) -> PIL.Image.Image:
    """The image at a URL or a path, or of base64 text, in RGB, as transformers' ``load_image`` gives it.

    Raises:
        ValueError: it is none of these, or as for `open_image`.
        OSError: it cannot be fetched or read.
    """
    if source.startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "convnext_fast"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                data = answer.read(MOST_BYTES + 1)
        except http.client.InvalidURL as error:
            raise ValueError(f"{source[:200]!r} is not a URL: {error}") from None
        except http.client.HTTPException as error:
            raise OSError(f"{source[:200]!r}: the server's answer is broken: {error!r}") from error
        return open_image(data).convert("RGB")
    if os.path.isfile(source):
        return open_image(Path(source)).convert("RGB")
    try:
        text = source.split(",")[1] if source.startswith("data:image/") else source
        data = base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, IndexError):
        raise ValueError(f"{source[:200]!r} is not a file, an http:// or https:// URL or base64 text") from None
    return open_image(data).convert("RGB")


def open_image(source: Path | bytes, channels: int | None = None) -> PIL.Image.Image:
    """The decoded image, upright by its EXIF orientation, in the mode that has ``channels`` channels.

    Args:
        source: a file, or the bytes of one.
        channels: 1 for grey, 2 for grey and alpha, 3 for RGB (transparency over white), 4 for RGBA; None keeps the
            image's mode.

    Raises:
        ValueError: it is not an image of one of ``FORMATS``, is broken, or has too many pixels or bytes; or
            ``channels`` is not 1 to 4.
        OSError: the file cannot be read.
    """
    if channels is not None:
        _mode(channels)
    data = source
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"the file is too large for an image: expected at most {MOST_BYTES:,} bytes")
    if not data:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            # An image beyond pillow's limit is refused; pillow only warns.
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            upright = _upright(image)
            return upright if channels is None else to_channels(upright, channels)
    except PIL.UnidentifiedImageError:
        raise ValueError(f"not an image of a format that is read ({', '.join(FORMATS)})") from None
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"refused: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files can raise anything
        raise ValueError(f"broken image: {error}") from error


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """``image`` rotated by its EXIF orientation; unchanged if that cannot be read."""
    try:
        return PIL.ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        return image


def to_channels(image: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """``image`` in the mode that has ``channels`` channels, as in `open_image`."""
    mode = _mode(channels)
    if image.mode == mode:
        return image
    if image.mode == "I;16B":
        image = image.convert("I")
    if image.mode.startswith("I"):
        # Pillow would cut 16-bit samples at 255; keep their upper byte.
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if mode in ("RGB", "L") and image.has_transparency_data:
        image = over_white(image)
    return image.convert(mode)


def _mode(channels: int) -> str:
    if channels not in _MODES:
        raise ValueError(f"the model takes {channels} channels: images have 1, 2, 3 or 4")
    return _MODES[channels]
