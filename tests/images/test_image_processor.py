"""The image processor against transformers' PIL processor, run side by side."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from convnext_fast.images.options import DEFAULTS
from convnext_fast.images.processor import ConvNextFeatureExtractor, ConvNextImageProcessor

transformers = pytest.importorskip("transformers")
from transformers.models.convnext.image_processing_pil_convnext import (  # noqa: E402
    ConvNextImageProcessorPil as Theirs,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*channels could be on either end:UserWarning")
RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
# Older ones lay no transparency over white, and leave the channels of arrays as they are.
converts_alike = pytest.mark.skipif(RELEASE < (5, 24), reason="transformers before 5.24 converts to RGB otherwise")
GRID = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pixels(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(height=40, width=30, mode="RGB", seed=0):
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    shape = (height, width) if channels == 1 else (height, width, channels)
    return PIL.Image.fromarray(pixels(shape, seed), mode)


numbers = st.floats(0.05, 2.0)
flags = st.sampled_from([True, True, False])


@st.composite
def option_sets(draw, channels=3):
    """Options of a call, every one of them sometimes left out."""
    per_channel = st.one_of(numbers, st.lists(numbers, min_size=channels, max_size=channels))
    every = {
        "do_resize": flags,
        "size": st.one_of(
            st.integers(1, 64),
            st.integers(1, 64).map(lambda s: {"shortest_edge": s}),
            st.sampled_from([383, 384, 391]),
            st.just({"shortest_edge": 20, "longest_edge": 24}),
        ),
        "crop_pct": st.one_of(st.just(224 / 256), st.floats(0.4, 1.5), st.just(1.0)),
        "resample": st.sampled_from(list(PIL.Image.Resampling)),
        "do_rescale": flags,
        "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 0.5, 1.0]),
        "do_normalize": flags,
        "image_mean": per_channel,
        "image_std": per_channel,
    }
    options = {name: draw(values) for name, values in every.items() if name == "size" or draw(st.booleans())}
    if channels != 3:
        options |= {name: draw(per_channel) for name in ("image_mean", "image_std")}
    if draw(st.booleans()):
        crop = st.integers(1, 50)
        options |= {"do_center_crop": True, "crop_size": {"height": draw(crop), "width": draw(crop)}}
    return options


@st.composite
def arrays(draw, height, width, channels):
    """An image's values (height, width, channels) in one of the dtypes and ranges that people feed."""
    bytes_ = pixels((height, width, channels), draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["uint8", "int32", "int64", "float32", "float16", "fractions", "fractions64"]))
    if kind.startswith("fractions"):
        return (bytes_ / 255).astype(np.float64 if kind == "fractions64" else np.float32)
    return bytes_.astype(kind)


@st.composite
def inputs(draw):
    """(images, options): one or several images of one kind, in any container."""
    kind = draw(st.sampled_from(["pil", "numpy", "torch"]))
    channels = draw(st.sampled_from([3, 3, 3, 1, 4]))
    sides = st.integers(1, 60)
    options = draw(option_sets(channels))
    count = draw(st.sampled_from([1, 1, 2, 3]))
    images = []
    for _ in range(count):
        height, width = draw(sides), draw(sides)
        if kind == "pil":
            mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
            images.append(photo(height, width, mode, draw(st.integers(0, 2**16))))
            continue
        array = draw(arrays(height, width, channels))
        if draw(st.booleans()):
            array = np.ascontiguousarray(array.transpose(2, 0, 1))
        images.append(torch.from_numpy(array) if kind == "torch" else array)
    container = draw(st.sampled_from(["list", "tuple", "nested"] + ["single"] * (count == 1)))
    if container == "single":
        return images[0], options
    if container == "nested":
        split = draw(st.integers(0, count))
        return [images[:split], images[split:]], options
    return (tuple(images) if container == "tuple" else images), options


def assert_same(ours, theirs):
    ours, theirs = ours["pixel_values"], theirs["pixel_values"]
    assert isinstance(ours, list)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine, other)


@converts_alike
@GRID
@given(inputs())
def test_pixels_equal_those_of_transformers(drawn):
    images, options = drawn
    try:
        expected = Theirs()(images, **options)
    except ValueError:
        with pytest.raises(ValueError, match=r"image|crop_pct"):
            ConvNextImageProcessor()(images, **options)
        return
    assert_same(ConvNextImageProcessor()(images, **options), expected)
    assert_same(ConvNextImageProcessor(**options)(images), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 420), st.floats(0.3, 1.3), st.sampled_from([0, 2, 3]))
@example(375, 500, 224, 224 / 256, 3)
@example(500, 375, 384, 224 / 256, 3)
@example(1, 17, 1, 1.3, 3)
def test_photograph_sizes(height, width, size, crop_pct, resample):
    # A thin image would grow by its aspect ratio into one that the machine cannot hold.
    width = min(width, 20 * height)
    height = min(height, 20 * width)
    options = {"size": size, "crop_pct": crop_pct, "resample": resample}
    image = photo(height, width)
    if size < 384 and int(size / crop_pct) < 1:
        with pytest.raises(ValueError, match="crop_pct"):
            ConvNextImageProcessor(**options)(image)
        return
    assert_same(ConvNextImageProcessor(**options)(image), Theirs(**options)(image))


@pytest.mark.parametrize("resample", list(PIL.Image.Resampling))
@pytest.mark.parametrize("size", [24, 384])
def test_every_filter(resample, size):
    image = photo(50, 41)
    options = {"size": size, "resample": resample}
    assert_same(ConvNextImageProcessor(**options)(image), Theirs(**options)(image))
    assert_same(ConvNextImageProcessor(size=size)(image, resample=int(resample)), Theirs(**options)(image))


@pytest.mark.parametrize("kind", ["pil", "numpy"])
@pytest.mark.parametrize("crop", [(8, 9), (9, 8), (5, 14), (14, 5), (13, 13), (16, 15), 20])
@pytest.mark.parametrize("size", [(8, 9), (11, 12)])
def test_center_crop(size, crop, kind):
    image = photo(*size) if kind == "pil" else pixels((*size, 3))
    crop_size = crop if isinstance(crop, int) else {"height": crop[0], "width": crop[1]}
    options = {"do_resize": False, "do_center_crop": True, "crop_size": crop_size}
    assert_same(ConvNextImageProcessor(**options)(image), Theirs(**options)(image))
    assert_same(
        ConvNextImageProcessor(do_resize=False)(image, do_center_crop=True, crop_size=crop), Theirs(**options)(image)
    )


def test_defaults_are_those_of_transformers():
    theirs = Theirs().to_dict()
    ours = ConvNextImageProcessor().to_dict()
    assert ours == {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()}
    assert ours["size"] == {"shortest_edge": 384}
    assert ours["crop_pct"] == 224 / 256
    assert ours["resample"] == PIL.Image.Resampling.BICUBIC
    assert ConvNextFeatureExtractor is ConvNextImageProcessor


def test_the_384_rule():
    image = photo(30, 90)
    warped = ConvNextImageProcessor(size=384, do_normalize=False, do_rescale=False)(image)["pixel_values"][0]
    np.testing.assert_array_equal(
        warped.transpose(1, 2, 0), np.asarray(image.resize((384, 384), PIL.Image.Resampling.BICUBIC))
    )
    cropped = ConvNextImageProcessor(size=28, do_normalize=False, do_rescale=False)(image)["pixel_values"][0]
    whole = np.asarray(image.resize((96, 32), PIL.Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(cropped.transpose(1, 2, 0), whole[2:30, 34:62])


@converts_alike
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "I;16", "PA"])
def test_do_convert_rgb(mode):
    if mode in ("P", "PA", "1", "CMYK"):
        image = photo(33, 20, "RGB").convert(mode if mode != "PA" else "P")
        image = image.convert("PA") if mode == "PA" else image
    elif mode == "I;16":
        image = PIL.Image.fromarray(pixels((33, 20)).astype(np.uint16))
    else:
        image = photo(33, 20, mode)
    options = {"size": 16, "do_convert_rgb": True}
    assert_same(ConvNextImageProcessor(**options)(image), Theirs(**options)(image))


@converts_alike
def test_transparency_is_laid_over_white():
    clear = PIL.Image.new("RGBA", (9, 9), (10, 20, 30, 0))
    out = ConvNextImageProcessor(size=4, do_convert_rgb=True)(clear)["pixel_values"][0]
    np.testing.assert_array_equal(out, np.ones((3, 4, 4), np.float32))
    palette = photo(12, 12).convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    palette.info["transparency"] = 3
    options = {"size": 8, "do_convert_rgb": True}
    assert_same(ConvNextImageProcessor(**options)(palette), Theirs(**options)(palette))


@converts_alike
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_do_convert_rgb_of_arrays(channels, dtype, layout):
    array = pixels((21, 17, channels))
    array = array.astype(dtype) if "int" in dtype else (array / 255).astype(dtype)
    array = array.transpose(2, 0, 1) if layout == "channels_first" else array
    options = {"size": 16, "do_convert_rgb": True, "input_data_format": layout}
    assert_same(ConvNextImageProcessor(**options)(array), Theirs(**options)(array))


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_wide_grey_images(mode):
    image = PIL.Image.fromarray(pixels((19, 23)).astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]))
    assert image.mode == mode
    options = {"size": 12, "image_mean": [0.5], "image_std": [0.2]}
    assert_same(ConvNextImageProcessor(**options)(image), Theirs(**options)(image))


def test_layout_is_inferred_or_given():
    last = pixels((20, 30, 3))
    first = last.transpose(2, 0, 1)
    processor = ConvNextImageProcessor(size=16)
    expected = processor(last, return_tensors="np").pixel_values
    np.testing.assert_array_equal(processor(first, return_tensors="np").pixel_values, expected)
    for layout, array in (("channels_first", first), ("channels_last", last)):
        given_layout = processor(array, input_data_format=layout, return_tensors="np").pixel_values
        np.testing.assert_array_equal(given_layout, expected)
    narrow = pixels((3, 30, 3))
    with pytest.warns(UserWarning, match=r"image 0 has shape \(3, 30, 3\).*either end"):
        guessed = processor(narrow)
    assert_same(guessed, Theirs(size=16)(narrow))
    assert_same(
        processor(narrow, input_data_format="channels_last"), Theirs(size=16)(narrow, input_data_format="channels_last")
    )


def test_grey_arrays_without_a_channel_axis():
    grey = pixels((20, 30))
    processor = ConvNextImageProcessor(size=16, image_mean=0.5, image_std=0.5)
    for image in (grey, torch.from_numpy(grey), [grey]):
        assert_same(processor(image), processor(grey[None]))
    assert processor(grey, do_convert_rgb=True)["pixel_values"][0].shape == (3, 16, 16)


@pytest.mark.parametrize("framework", [None, "np", "pt"])
def test_output_layout(framework):
    images = [photo(20, 30), photo(30, 20, seed=1)]
    processor = ConvNextImageProcessor(size=16)
    first = processor(images, return_tensors=framework, data_format="channels_first")["pixel_values"]
    last = processor(images, return_tensors=framework, data_format="channels_last")["pixel_values"]
    assert np.shape(last[0]) == (16, 16, 3)
    for mine, other in zip(last, first, strict=True):
        np.testing.assert_array_equal(np.moveaxis(np.asarray(mine), -1, 0), np.asarray(other))


@pytest.mark.parametrize("images", [np.uint8, torch.uint8])
def test_batches_of_four_dimensions(images):
    batch = pixels((3, 3, 20, 30))
    batch = torch.from_numpy(batch) if images is torch.uint8 else batch
    processor, theirs = ConvNextImageProcessor(size=16), Theirs(size=16)
    assert_same(processor(batch), theirs(batch))
    assert_same(processor([batch, batch]), theirs([batch, batch]))


def test_tensor_outputs():
    image = photo()
    expected = Theirs(size=16)(image, return_tensors="np")["pixel_values"]
    as_numpy = ConvNextImageProcessor(size=16)(image, return_tensors="np")["pixel_values"]
    as_torch = ConvNextImageProcessor(size=16)(image, return_tensors="pt")["pixel_values"]
    assert as_numpy.shape == (1, 3, 16, 16)
    assert as_numpy.flags.c_contiguous
    np.testing.assert_array_equal(as_numpy, expected)
    assert as_torch.dtype == torch.float32
    assert torch.equal(as_torch, torch.from_numpy(expected))
    enumeration = transformers.utils.TensorType.PYTORCH
    assert torch.equal(ConvNextImageProcessor(size=16)(image, return_tensors=enumeration).pixel_values, as_torch)


@pytest.mark.parametrize(("framework", "module"), [("jax", "jax"), ("tf", "tensorflow")])
def test_other_frameworks(framework, module):
    processor = ConvNextImageProcessor(size=16)
    try:
        __import__(module)
    except ImportError:
        with pytest.raises(ImportError, match=f"return_tensors='{framework}' needs {module}"):
            processor(photo(), return_tensors=framework)
    else:
        out = processor(photo(), return_tensors=framework).pixel_values
        assert type(out).__module__.startswith(("jax", "tensorflow"))
        np.testing.assert_array_equal(np.asarray(out), processor(photo(), return_tensors="np").pixel_values)


def test_dtypes_of_a_mixed_batch_are_promoted_as_in_transformers():
    images = [pixels((3, 8, 8)), pixels((3, 8, 8)).astype(np.float64)]
    options = {"do_resize": False, "do_rescale": False, "return_tensors": "np"}
    ours, theirs = ConvNextImageProcessor(**options)(images), Theirs(**options)(images)
    assert ours.pixel_values.dtype == theirs["pixel_values"].dtype == np.float64
    np.testing.assert_array_equal(ours.pixel_values, theirs["pixel_values"])


def test_tensors_of_dtypes_that_numpy_lacks():
    image = torch.from_numpy(pixels((3, 20, 20)))
    processor = ConvNextImageProcessor(size=16)
    expected = processor(image)
    assert_same(processor(image.to(torch.bfloat16)), processor(image.to(torch.bfloat16).float()))
    assert_same(processor(image.float().requires_grad_()), expected)


def test_input_is_not_modified():
    array = pixels((3, 12, 12)).astype(np.float32)
    before = array.copy()
    out = ConvNextImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)(array)["pixel_values"][0]
    out += 1
    ConvNextImageProcessor(do_resize=False)(array)
    np.testing.assert_array_equal(array, before)


def test_attributes_may_be_assigned():
    processor = ConvNextImageProcessor(size=16)
    processor.size = {"shortest_edge": 20}
    processor.do_normalize = False
    assert_same(processor(photo()), Theirs(size=20, do_normalize=False)(photo()))
    processor.size["shortest_edge"] = 24
    assert processor(photo())["pixel_values"][0].shape == (3, 24, 24)
    assert ConvNextImageProcessor().size == {"shortest_edge": 384}
    size = {"shortest_edge": 16}
    ConvNextImageProcessor(size=size).size["shortest_edge"] = 24
    assert size == {"shortest_edge": 16}
    processor.crop_pct = -1
    with pytest.raises(ValueError, match="crop_pct"):
        processor(photo())


def test_none_means_the_processors_own_value():
    processor = ConvNextImageProcessor(size=16, image_mean=0.1)
    assert_same(processor(photo(), **dict.fromkeys(DEFAULTS)), processor(photo()))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(option_sets())
def test_each_reads_the_files_of_the_other(tmp_path, options):
    ours, theirs = ConvNextImageProcessor(**options), Theirs(**options)
    image = photo(25, 31)
    expected = ours(image)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(expected, Theirs.from_pretrained(tmp_path / "ours")(image))
    assert_same(ConvNextImageProcessor.from_pretrained(tmp_path / "theirs")(image), theirs(image))
    assert ConvNextImageProcessor.from_pretrained(tmp_path / "ours") == ours
    assert ConvNextImageProcessor.from_dict(ours.to_dict()) == ours


def test_auto_image_processor_reads_ours(tmp_path):
    ConvNextImageProcessor(size=40).save_pretrained(tmp_path)
    loaded = transformers.AutoImageProcessor.from_pretrained(str(tmp_path))
    assert type(loaded).__name__.startswith("ConvNextImageProcessor")
    assert loaded.size["shortest_edge"] == 40


def test_older_files_load(tmp_path):
    fields = {
        "crop_pct": None,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 224,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    ours = ConvNextFeatureExtractor.from_pretrained(str(tmp_path))
    assert ours.size == {"shortest_edge": 224}
    assert ours.crop_pct == 224 / 256
    assert "feature_extractor_type" not in ours.to_dict()
    del fields["crop_pct"]
    assert_same(ours(photo()), Theirs(**fields)(photo()))


def test_unknown_keys_survive(tmp_path):
    extra = {"do_pad": False, "made_by": {"name": "somebody", "runs": [1, 2]}}
    processor = ConvNextImageProcessor.from_dict({"size": 32, **extra})
    processor.save_pretrained(tmp_path)
    processor.extra["made_by"]["runs"].append(3)
    again = ConvNextImageProcessor.from_pretrained(tmp_path, crop_pct=0.9)
    assert again.extra == extra
    assert again.crop_pct == 0.9
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written.items() >= extra.items()
    assert extra["made_by"]["runs"] == [1, 2]


def test_equality_and_repr():
    assert ConvNextImageProcessor(size=224) == ConvNextImageProcessor(size={"shortest_edge": 224})
    assert ConvNextImageProcessor(size=224) != ConvNextImageProcessor(size=225)
    assert '"shortest_edge": 224' in repr(ConvNextImageProcessor(size=224))


def test_hub_id_without_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"'\.\[hub\]'"):
        ConvNextImageProcessor.from_pretrained("facebook/convnext-tiny-224")


def test_hub_id_from_the_cache(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--somebody--convnext", "0" * 40
    ConvNextImageProcessor(size=48).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert ConvNextImageProcessor.from_pretrained("somebody/convnext").size == {"shortest_edge": 48}
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        ConvNextImageProcessor.from_pretrained("somebody/else")
