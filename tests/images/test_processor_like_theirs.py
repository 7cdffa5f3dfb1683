"""The image processor's members and options that transformers' callers use, beside its own."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import threading

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil as Theirs

from convnext_fast import ConvNextImageProcessor

SIZE = {"size": {"shortest_edge": 16}}
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def image(mode="RGB"):
    if mode == "LAB":
        return PIL.Image.frombytes("LAB", (30, 40), PIXELS.tobytes())
    if mode == "I;16":
        return PIL.Image.fromarray(PIXELS[..., 0].astype(np.uint16))
    return PIL.Image.fromarray(PIXELS).convert(mode)


def same(options, given, **call):
    ours = ConvNextImageProcessor(**SIZE, **options)(given, return_tensors="pt", **call)
    theirs = Theirs(**SIZE, **options)(given, return_tensors="pt", **call)
    return torch.equal(ours.pixel_values, theirs.pixel_values) and ours.data.keys() == theirs.data.keys()


@pytest.mark.parametrize("mode", ["RGB", "YCbCr", "HSV", "LAB"])
def test_modes_of_three_channels(mode):
    assert same({}, image(mode))
    assert same({"do_convert_rgb": True}, image(mode))


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_modes_of_one_channel(mode):
    assert same({"image_mean": 0.5, "image_std": 0.5}, image(mode))


@pytest.fixture
def address(tmp_path):
    """Of a server of files in ``tmp_path``."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_paths_addresses_and_text(mode, tmp_path, address):
    path, exif = tmp_path / "a.png", PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    given = image(mode)
    if mode in ("RGBA", "LA"):
        given.putalpha(100)
    given.save(path, exif=exif)
    text = base64.b64encode(path.read_bytes()).decode()
    lines = base64.encodebytes(path.read_bytes()).decode()
    for source in (str(path), f"{address}/a.png", text, lines, f"data:image/png;base64,{text}", [str(path), text]):
        assert same({}, source), source


@pytest.mark.parametrize("name", ["bicubic", "BICUBIC", "lanczos", "nearest"])
def test_filters_by_name(name):
    number = PIL.Image.Resampling[name.upper()]
    named, numbered = (ConvNextImageProcessor(**SIZE, resample=value) for value in (name, number))
    assert named == numbered
    batches = [p(image(), return_tensors="pt").pixel_values for p in (named, numbered)]
    batches.append(ConvNextImageProcessor(**SIZE)(image(), return_tensors="pt", resample=name).pixel_values)
    assert all(torch.equal(batch, batches[0]) for batch in batches)


def test_options_of_a_call():
    options = {"device": "cpu", "default_to_square": False, "disable_grouping": True, "image_seq_length": 3}
    assert same({}, image(), **options, do_pad=False, pad_size=None)
    with pytest.raises(ValueError, match="do_pad is True: this processor does not pad"):
        ConvNextImageProcessor(**SIZE)(image(), do_pad=True)
    moved = ConvNextImageProcessor(**SIZE)(image(), return_tensors="pt", device="meta")
    assert moved.pixel_values.device.type == "meta"
    assert "device" not in ConvNextImageProcessor(device="cpu").to_dict()


def test_files(tmp_path):
    ours = ConvNextImageProcessor(**SIZE, resample="lanczos")
    assert ours.save_pretrained(tmp_path / "inner") == [str(tmp_path / "inner" / "preprocessor_config.json")]
    loading = {"subfolder": "inner", "revision": "main", "token": "t", "local_files_only": True}
    for kind in (ConvNextImageProcessor, Theirs):
        read = kind.from_pretrained(tmp_path, **loading)
        assert read.size["shortest_edge"] == 16
        assert not loading.keys() & read.to_dict().keys()
    ours.to_json_file(tmp_path / "x.json")
    assert ConvNextImageProcessor.from_json_file(tmp_path / "x.json") == ours
    assert ConvNextImageProcessor.from_pretrained(tmp_path / "x.json") == ours
    assert json.loads(ours.to_json_string()) == ours.to_dict()
    made, left = ConvNextImageProcessor.from_dict({}, return_unused_kwargs=True, size=20, heads=2)
    assert (made.size, left) == ({"shortest_edge": 20}, {"heads": 2})
    with pytest.raises(TypeError, match="unknown option 'heads'"):
        ConvNextImageProcessor.from_pretrained(tmp_path / "inner", heads=2)


def test_an_image_processor_of_transformers_by_isinstance():
    processor = ConvNextImageProcessor()
    assert isinstance(processor, transformers.image_processing_utils.BaseImageProcessor)
    assert type(processor) is ConvNextImageProcessor
    assert {"size", "crop_pct", "resample"} <= set(ConvNextImageProcessor.valid_kwargs.__annotations__)
