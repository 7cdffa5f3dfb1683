import os
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from convnext_fast.cli import demo
from convnext_fast.images.processor import ConvNextImageProcessor
from convnext_fast.models.huggingface import ConvNextForImageClassification
from convnext_fast.training.digits import digits_config, digits_processor, load_digits

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def held_out():
    return load_digits()[1]


def test_the_split_is_fixed_stratified_and_complete():
    from sklearn.datasets import load_digits as load

    training, held_out = load_digits()
    assert (len(training), len(held_out)) == (1201, 596)
    data = load()
    key = {image.tobytes(): i for i, image in enumerate(np.round(data.images * 255 / 16).astype(np.uint8))}
    parts = [[key[image.tobytes()] for image in part.pictures] for part in (training, held_out)]
    assert len(key) == 1797, "each image is unique, so that the parts can be told apart"
    assert sorted(parts[0] + parts[1]) == list(range(1797))
    for part, labels in zip(parts, (training.labels, held_out.labels), strict=True):
        assert data.target[part].tolist() == labels
    counts = np.bincount(held_out.labels) / np.bincount(data.target)
    assert counts.min() > 0.32
    assert counts.max() < 0.34


def test_the_included_model_is_small_and_made_by_the_training_command():
    size = sum(path.stat().st_size for path in demo.ASSETS.iterdir())
    assert size < 2_000_000
    model = ConvNextForImageClassification.from_pretrained(demo.ASSETS)
    fields = {"drop_path_rate": 0.1}
    assert model.config.to_dict() | fields == {**model.config.to_dict(), **digits_config().to_dict(), **fields}
    assert model.config.id2label == {i: str(i) for i in range(10)}
    assert ConvNextImageProcessor.from_pretrained(demo.ASSETS) == digits_processor()


def test_transformers_reads_the_held_out_digits_too(held_out):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ConvNextForImageClassification.from_pretrained(demo.ASSETS).eval()
    processor = ConvNextImageProcessor.from_pretrained(demo.ASSETS)
    pixels = processor([held_out.open(i, 1) for i in range(len(held_out))], return_tensors="pt").pixel_values
    ours = ConvNextForImageClassification.from_pretrained(demo.ASSETS)
    with torch.inference_mode():
        logits, expected = ours(pixels).logits, theirs(pixels).logits
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert (expected.argmax(1).numpy() == held_out.labels).mean() >= 0.98


def test_the_command_prints_what_it_found_and_draws_it(tmp_path, held_out):
    command = [sys.executable, "-m", "convnext_fast", "demo", "--device", "cpu"]
    environment = os.environ | {"COLUMNS": "40", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    percent, right, count = re.search(r"accuracy: ([\d.]+)% \((\d+) of (\d+)\)", text).groups()
    assert int(count) == len(held_out) == 596
    assert float(percent) >= 98.0
    assert float(percent) == pytest.approx(100 * int(right) / 596, abs=0.01)
    assert re.search(r"against fused=False: same predictions, logits within \d\.\de-\d+", text)
    assert re.search(r"fused=True: [\d,]+ images/s fused=False: [\d,]+ images/s, so fused is \d+\.\d\d times", text)
    assert 100 < int(re.search(r"peak resident memory: ([\d,]+) MiB", text)[1].replace(",", "")) < 4000
    with PIL.Image.open(tmp_path / "convnext_fast_digits.png") as sheet:
        assert sheet.width > 800
        assert sheet.height > 600


def outcome(labels, predictions):
    labels, predictions = np.array(labels), np.array(predictions)
    return demo.Outcome(labels, predictions, np.full(len(labels), 0.5), 0.0, True, 1.0, 1.0, "aten on cpu")


def frames(sheet):
    """For each cell, row by row, whether its frame is that of a mistake."""
    pixels, found = np.asarray(sheet).astype(int), []
    for y in range(64, sheet.height - 100, 104):
        for x in range(8, sheet.width - 80, 88):
            corner = pixels[y - 2, x + 10]
            found.append(bool(corner[0] > 180 > 80 > corner[1]))
    return found


def test_the_sheet_shows_every_mistake_first():
    digits = [PIL.Image.new("L", (8, 8), 200)] * 150
    labels = [i % 10 for i in range(150)]
    read = list(labels)
    for wrong in (3, 70, 149):
        read[wrong] = (read[wrong] + 1) % 10
    found = frames(demo.draw_sheet(digits, outcome(labels, read)))
    assert found == [True] * 3 + [False] * 93
    many = demo.draw_sheet(digits, outcome(labels, [(label + 1) % 10 for label in labels]))
    assert sum(frames(many)) == 150
    assert not any(frames(demo.draw_sheet(digits, outcome(labels, labels))))


def test_an_output_that_cannot_be_written_is_an_error(tmp_path, capsys):
    from convnext_fast.cli.commands import main

    assert main(["demo", "--output", str(tmp_path / "no" / "such.png"), "--device", "cpu"]) == 1
    assert main(["demo", "--output", str(tmp_path / "sheet.text"), "--device", "cpu"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "no/such.png: there is no folder" in errors[0]
    assert "sheet.text has no suffix of an image format" in errors[1]
