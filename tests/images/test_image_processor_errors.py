"""What the image processor refuses: every error names what was wrong and what was expected."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest

from convnext_fast.images.processor import ConvNextImageProcessor


def pixels(shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def photo(height=40, width=30, mode="RGB"):
    return PIL.Image.fromarray(pixels((height, width, 3))).convert(mode)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"do_resize": 1}, TypeError, "do_resize is 1: expected True or False"),
        ({"do_convert_rgb": "yes"}, TypeError, "do_convert_rgb"),
        ({"size": 0}, ValueError, "size.*shortest_edge.*positive"),
        ({"size": True}, TypeError, "size is True"),
        ({"size": 22.4}, TypeError, "size is 22.4"),
        ({"size": (1, 2, 3)}, TypeError, "size is"),
        ({"size": {"edge": 3}}, ValueError, "size has the keys.*shortest_edge"),
        ({"size": {"shortest_edge": "3"}}, TypeError, "size.*'3'"),
        ({"size": {"height": 3, "width": 3}}, ValueError, "size is.*shortest_edge"),
        ({"size": (3, 3)}, ValueError, "size is.*shortest_edge"),
        ({"crop_pct": 0}, ValueError, "crop_pct is 0.0: expected a positive"),
        ({"crop_pct": float("nan")}, ValueError, "crop_pct"),
        ({"crop_pct": "0.9"}, TypeError, "crop_pct"),
        ({"crop_pct": 100.0, "size": 32}, ValueError, "crop_pct is 100.0.*expected 1 to"),
        ({"resample": 60}, ValueError, r"resample is 60.*3 \(BICUBIC\)"),
        ({"resample": "sharp"}, TypeError, "resample"),
        ({"device": "cpu"}, ValueError, "device is cpu, return_tensors None: expected 'pt'"),
        ({"device": "moon"}, ValueError, "device is 'moon'"),
        ({"do_center_crop": True}, ValueError, "crop_size is None"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, ValueError, "crop_size is.*height"),
        ({"crop_size": -2}, ValueError, "crop_size"),
        ({"rescale_factor": float("inf")}, ValueError, "rescale_factor"),
        ({"rescale_factor": None, "do_rescale": "no"}, TypeError, "do_rescale"),
        ({"image_mean": "0.5"}, TypeError, "image_mean"),
        ({"image_mean": [0.5, None, 0.5]}, TypeError, r"image_mean\[1\]"),
        ({"image_mean": []}, ValueError, "image_mean is empty"),
        ({"image_mean": [0.5, 0.5]}, ValueError, r"image 0 has 3 channel\(s\) but image_mean has 2"),
        ({"image_std": [0.5, 0.0, 0.5]}, ValueError, r"image_std\[1\] is 0.0: expected a positive"),
        ({"image_std": [0.5] * 4}, ValueError, r"image 0 has 3 channel\(s\) but image_std has 4"),
        ({"return_tensors": "mlx"}, ValueError, "return_tensors is 'mlx': expected one of np, pt, jax, tf"),
        ({"return_tensors": True}, TypeError, "return_tensors"),
        ({"data_format": "nchw"}, ValueError, "data_format is 'nchw': expected one of channels_first, channels_last"),
        ({"input_data_format": 3}, TypeError, "input_data_format"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        ConvNextImageProcessor()(photo(), **options)
    with pytest.raises(error, match=words):
        ConvNextImageProcessor(**options)(photo())


def truncated_photo():
    file = io.BytesIO()
    photo(64, 64).save(file, "PNG")
    return PIL.Image.open(io.BytesIO(file.getvalue()[:4000]))


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (b"photo.jpg", TypeError, "images is a bytes: expected a PIL image, a numpy array, a torch tensor or a string"),
        ("a photo.jpg", ValueError, "image 0: 'a photo.jpg' is not a file, an http:// or https:// URL or base64 text"),
        ("data:image/png", ValueError, "image 0: 'data:image/png' is not a file"),
        ("aGVsbG8=", ValueError, "image 0: not an image of a format that is read"),
        (["http://127.0.0.1:9/a.png"], OSError, "image 0: .*refused"),
        ("http://a b/c.png", ValueError, "image 0: 'http://a b/c.png' is not a URL"),
        ("http://localhost:port/c.png", ValueError, "image 0: 'http://localhost:port/c.png' is not a URL"),
        ([photo(), None], TypeError, r"images\[1\] is a NoneType"),
        ([[photo(), 3]], TypeError, r"images\[0\]\[1\] is a int"),
        ([[[photo()]]], ValueError, r"images\[0\]\[0\] is a list.*one level"),
        ([], ValueError, "images is empty"),
        ([[], []], ValueError, "images is empty"),
        (pixels((4,)), ValueError, r"images has shape \(4,\)"),
        (pixels((1, 1, 3, 8, 8)), ValueError, r"images has shape \(1, 1, 3, 8, 8\)"),
        ([photo(), pixels((7, 8, 9))], ValueError, r"image 1 has shape \(7, 8, 9\).*input_data_format"),
        (np.zeros((3, 0, 8), np.uint8), ValueError, r"image 0 has shape \(3, 0, 8\).*one pixel"),
        (PIL.Image.new("RGB", (0, 5)), ValueError, "image 0 is 0×5 pixels"),
        (np.zeros((3, 8, 8), complex), ValueError, "image 0 has dtype complex128"),
        (np.zeros((3, 8, 8), object), ValueError, "image 0 has dtype object"),
        (np.full((3, 8, 8), 300), ValueError, "image 0 has values from 300 to 300.*255"),
        (np.full((3, 8, 8), -1.0), ValueError, "image 0 has values from -1.0"),
        (np.full((3, 8, 8), 3.5), ValueError, "image 0 has values from 3.5"),
        (np.full((3, 8, 8), np.nan), ValueError, "image 0 has values from nan"),
        (photo(mode="L"), ValueError, r"image 0 has 1 channel\(s\) but image_mean has 3.*do_convert_rgb"),
        ([photo(), photo(mode="RGBA")], ValueError, r"image 1 has 4 channel\(s\) but image_mean has 3"),
        (photo().convert("P"), ValueError, "image 0 has PIL mode 'P'.*do_convert_rgb"),
        (photo().convert("CMYK"), ValueError, "image 0 has PIL mode 'CMYK'"),
        (truncated_photo(), ValueError, "image 0 cannot be decoded"),
    ],
)
def test_bad_images(images, error, words):
    with pytest.raises(error, match=words):
        ConvNextImageProcessor(size=16)(images)


def test_a_very_thin_image_is_refused_before_it_takes_gigabytes():
    with pytest.raises(
        ValueError, match=r"image 0 would be resized to (18285714×256|256×18285714|15360000×256|256×15360000)"
    ):
        ConvNextImageProcessor(size=224)(PIL.Image.new("RGB", (1, 60000)))


def test_more_bad_images():
    with pytest.raises(ValueError, match=r"image 0 has 5 channels: expected 1 to 4"):
        ConvNextImageProcessor(size=16)(pixels((5, 8, 8)), input_data_format="channels_first")
    with pytest.raises(ValueError, match=r"image 0 is RGBA in float32 with values from"):
        ConvNextImageProcessor()(pixels((4, 8, 8)).astype(np.float32), do_convert_rgb=True)
    with pytest.raises(ValueError, match="image 0 has PIL mode 'La'"):
        ConvNextImageProcessor()(PIL.Image.new("La", (5, 5)))
    with pytest.raises(ValueError, match=r"image 1 comes out with shape \(3, 9, 8\) and image 0 with \(3, 8, 8\)"):
        ConvNextImageProcessor(do_resize=False)([pixels((8, 8, 3)), pixels((9, 8, 3))], return_tensors="np")


def test_bad_files(tmp_path):
    with pytest.raises(TypeError, match="unknown option 'crop'"):
        ConvNextImageProcessor()(photo(), crop=3)
    with pytest.raises(TypeError, match="fields is a list"):
        ConvNextImageProcessor.from_dict([1])
    with pytest.raises(TypeError, match="unknown option 'crop'"):
        ConvNextImageProcessor.from_dict({}, crop=3)
    with pytest.raises(ValueError, match="image_processor_type is 'ViTImageProcessor'"):
        ConvNextImageProcessor.from_dict({"image_processor_type": "ViTImageProcessor"})
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        ConvNextImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unknown option 'do_resise'"):  # before the file is looked for
        ConvNextImageProcessor.from_pretrained(tmp_path, do_resise=True)
    with pytest.raises(TypeError, match="source"):
        ConvNextImageProcessor.from_pretrained(None)
    file = tmp_path / "preprocessor_config.json"
    for text, words in (("{", "not valid JSON"), ("[]", "holds a JSON list"), ('{"size": "big"}', "size is 'big'")):
        file.write_text(text)
        with pytest.raises((ValueError, TypeError), match=words):
            ConvNextImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        ConvNextImageProcessor().save_pretrained(file)
    with pytest.raises(TypeError, match="source is a NoneType"):
        ConvNextImageProcessor().save_pretrained(None)
