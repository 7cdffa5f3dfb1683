import io
import json
import struct
import subprocess
import sys

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_support import tiny_config

from convnext_fast import VARIANTS, ConvNext, ConvNextConfig, cli
from convnext_fast.cli.classify import Classifier
from convnext_fast.cli.info import count
from convnext_fast.images.default_processor import default_processor
from convnext_fast.images.files import open_image, to_channels
from convnext_fast.images.processor import ConvNextImageProcessor
from convnext_fast.models.huggingface import ConvNextForImageClassification

NAMES = ("ant", "bee", "cat")


def build(**fields):
    torch.manual_seed(0)
    config = tiny_config(**{"num_channels": 3, "num_labels": None, "id2label": dict(enumerate(NAMES)), **fields})
    model = ConvNextForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.normal_()
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    build().save_pretrained(folder)
    ConvNextImageProcessor(size=8, crop_pct=1.0, do_convert_rgb=True).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "b.jpg", "more/c.webp")):
        PIL.Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command in this process: (status, standard output, standard error)."""

    def run(*argv, stdin=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = cli.main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return run


def expected(checkpoint, path):
    """Names and probabilities of an image by the plain model, best first."""
    processor = ConvNextImageProcessor.from_pretrained(checkpoint)
    model = ConvNextForImageClassification.from_pretrained(checkpoint, fused=False)
    pixels = processor(PIL.Image.open(path), return_tensors="pt").pixel_values
    scores = model(pixels).logits.softmax(-1)[0].tolist()
    return sorted(zip(NAMES, scores, strict=True), key=lambda pair: -pair[1])


def records(text):
    return [json.loads(line) for line in text.splitlines()]


# classify


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_folder_gets_the_labels_of_the_plain_model(run, checkpoint, images, batch_size):
    status, out, err = run("classify", images, "--checkpoint", checkpoint, "--json", "--batch-size", batch_size)
    assert (status, err) == (0, "")
    found = records(out)
    assert [record["image"] for record in found] == [str(images / name) for name in ("a.png", "b.jpg", "more/c.webp")]
    for record in found:
        labels = [(p["label"], p["score"]) for p in record["predictions"]]
        for (label, score), (name, probability) in zip(labels, expected(checkpoint, record["image"]), strict=True):
            assert label == name == NAMES[next(p["index"] for p in record["predictions"] if p["label"] == label)]
            assert score == pytest.approx(probability, abs=1e-5)


def test_a_damaged_image_is_reported_and_the_others_continue(run, checkpoint, images):
    whole = (images / "a.png").read_bytes()
    (images / "a.png").write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").write_bytes(b"")
    arguments = [images, images / "gone.png", images / "notes.txt", "--checkpoint", checkpoint, "--json"]
    status, out, err = run("classify", *arguments)
    assert status == 1
    assert [record["image"] for record in records(out)] == [str(images / "b.jpg"), str(images / "more/c.webp")]
    lines = err.splitlines()
    assert len(lines) == 4
    for line, name, reason in zip(
        lines,
        ("a.png", "empty.png", "gone.png", "notes.txt"),
        ("broken image", "the file is empty", "No such file", "not an image"),
        strict=True,
    ):
        assert line.startswith(f"convnext-fast: error: {images / name}: ")
        assert reason in line


def test_standard_input_is_paths_or_an_image(run, checkpoint, images):
    paths = f"{images / 'b.jpg'}\n\n{images / 'more'}\n".encode()
    _, out, _ = run("classify", "-", "--checkpoint", checkpoint, "--json", stdin=paths)
    by_path = records(out)
    assert [record["image"] for record in by_path] == [str(images / "b.jpg"), str(images / "more/c.webp")]
    data = (images / "b.jpg").read_bytes()
    status, out, _ = run("classify", "-", "--checkpoint", checkpoint, "--json", stdin=data)
    assert status == 0
    (record,) = records(out)
    assert record["image"] == "standard input"
    for found, same in zip(record["predictions"], by_path[0]["predictions"], strict=True):
        assert found == same | {"score": pytest.approx(same["score"], abs=1e-5)}
    for stdin, reason in (
        (b"", "neither an image nor a path"),
        (b"\xff\x00\xfe", "neither an image of a format that is read nor a list of paths"),
        (data[: len(data) // 2], "broken image"),
    ):
        status, out, err = run("classify", "-", "--checkpoint", checkpoint, stdin=stdin)
        assert (status, out) == (1, "")
        assert reason in err


def test_labels_for_people(run, checkpoint, images, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    status, out, _ = run("classify", images / "a.png", "--checkpoint", checkpoint, "--top-k", 2)
    first, second, _ = expected(checkpoint, images / "a.png")
    assert status == 0
    lines = [str(images / "a.png"), *(f"  {score:7.2%}  {name}" for name, score in (first, second))]
    assert out.splitlines() == lines


def test_a_file_of_weights_reports_the_preprocessing_used(run, checkpoint, images, tmp_path):
    assert run("convert", checkpoint, tmp_path / "w.pth", "--to", "timm")[0] == 0
    status, out, err = run("classify", images, "--checkpoint", tmp_path / "w.pth", "--json")
    assert status == 0
    assert "has no preprocessor_config.json; using size 224, mean [0.485, 0.456, 0.406]" in err
    assert records(out)[0]["predictions"][0]["label"].startswith("LABEL_")


def test_inputs_of_many_sizes_and_one_that_is_too_small(run, checkpoint, images, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    ConvNextImageProcessor(do_resize=False, do_convert_rgb=True).save_pretrained(tmp_path)
    PIL.Image.new("RGB", (3, 3)).save(images / "aa.png")
    status, out, err = run("classify", images, "--checkpoint", tmp_path, "--json")
    assert status == 1
    assert [record["image"].rpartition("/")[2] for record in records(out)] == ["a.png", "b.jpg", "c.webp"]
    assert "aa.png: pixel_values is 3×3 pixels: expected at least 4×4" in err


@pytest.mark.parametrize(
    ("fields", "score"),
    [
        ({}, lambda logits: logits.softmax(-1)),
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "regression"}, lambda logits: logits),
    ],
)
def test_scores_follow_the_kind_of_problem(fields, score):
    classifier = Classifier(build(**fields), default_processor(tiny_config(num_channels=3)))
    logits = torch.tensor([0.5, -1.0, 2.0])
    predictions = classifier.predictions(logits, top_k=9)
    assert [p.label for p in predictions] == ["cat", "ant", "bee"]
    assert [p.score for p in predictions] == pytest.approx(score(logits)[[2, 0, 1]].tolist())


def test_a_model_without_classes_cannot_classify():
    model = ConvNextForImageClassification(tiny_config(num_labels=0, num_channels=3))
    with pytest.raises(ValueError, match="no classifier"):
        Classifier(model, default_processor(model.config))


# image files


@pytest.mark.parametrize(
    ("mode", "value", "channels", "expected"),
    [
        ("L", 90, 3, [90, 90, 90]),
        ("RGB", (10, 20, 30), 3, [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), 3, [255, 255, 255]),
        ("RGBA", (10, 20, 30, 128), 4, [10, 20, 30, 128]),
        ("LA", (10, 0), 1, [255]),
        ("I;16", 0x5A00, 1, [90]),
        ("1", 1, 3, [255, 255, 255]),
    ],
)
def test_an_image_has_the_requested_channels(tmp_path, mode, value, channels, expected):
    PIL.Image.new(mode, (4, 2), value).save(tmp_path / "x.png")
    image = open_image(tmp_path / "x.png", channels)
    assert image.size == (4, 2)
    assert np.asarray(image).reshape(8, channels).tolist() == [expected] * 8


def test_exif_orientation_is_applied(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg", 3).size == (20, 40)


def test_too_many_pixels_and_channels_are_refused(tmp_path, monkeypatch):
    PIL.Image.new("L", (40, 20)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="takes 5 channels"):
        open_image(tmp_path / "x.png", 5)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match="refused: Image size"):
        open_image(tmp_path / "x.png", 3)


# info


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (ConvNextConfig.from_variant("atto", num_labels=7), 71),
        (tiny_config(num_channels=2, num_labels=3, image_size=(20, 13), patch_size=(3, 2)), (20, 13)),
        (tiny_config(num_labels=0, layer_scale_init_value=0.0, depths=(0, 3)), 16),
        (ConvNextConfig.from_variant("v2_atto", num_labels=7), 71),
    ],
)
def test_the_counts_are_those_of_the_model(config, size):
    counts = count(config, size)
    model = ConvNext(config, fused=False, device="meta")
    assert sum(part.parameters for part in counts) == sum(p.numel() for p in model.parameters())
    height, width = (size, size) if isinstance(size, int) else size
    with FlopCounterMode(display=False) as counter:
        maps = model.forward_features(torch.empty(1, config.num_channels, height, width, device="meta"))
        model.forward_head(maps)
    assert 2 * sum(part.macs for part in counts) == counter.get_total_flops()
    assert maps.shape[1:] == (counts[-2].channels, counts[-2].height, counts[-2].width)


def test_sizes_of_the_paper():
    # Table 1 and table 12 of "A ConvNet for the 2020s": parameters in millions and "FLOPs" in G at 224².
    paper = {"tiny": (28.6, 4.5), "small": (50.2, 8.7), "base": (88.6, 15.4), "large": (197.8, 34.4)}
    # Table 14 of "ConvNeXt V2".
    paper |= {"v2_atto": (3.7, 0.55), "v2_nano": (15.6, 2.45), "v2_tiny": (28.6, 4.47)}
    for name, (millions, giga) in {**paper, "xlarge": (350.2, 60.9)}.items():
        counts = count(ConvNextConfig.from_variant(name, num_labels=1000))
        assert sum(part.parameters for part in counts) / 1e6 == pytest.approx(millions, abs=0.05)
        assert sum(part.macs for part in counts) / 1e9 == pytest.approx(giga, abs=0.05)


@pytest.mark.parametrize("columns", ["24", "100"])
def test_info_fits_every_terminal_width(run, checkpoint, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    status, out, _ = run("info")
    assert status == 0
    words = " ".join(out.split())
    assert all(
        name in words for name in (*VARIANTS, "aten", torch.__version__, "384-768-1536-3072", "Kernels for this CPU")
    )
    _, out, _ = run("info", "tiny")
    assert all(word in " ".join(out.split()) for word in ("28.59 M", "4.46 G", "stage4"))
    _, out, _ = run("info", checkpoint)
    assert "ConvNeXt V1. Names of transformers" in " ".join(out.split())
    body = [line for line in out.splitlines() if str(checkpoint) not in line]
    assert max(len(line.rstrip()) for line in body) <= int(columns)


# convert, errors, usage


def test_convert_there_and_back(run, checkpoint, tmp_path):
    status, out, _ = run("convert", checkpoint, tmp_path / "t", "--to", "torchvision")
    assert status == 0
    assert "under the names of torchvision" in out
    assert run("convert", tmp_path / "t", tmp_path / "back", "--to", "transformers")[0] == 0
    models = [ConvNextForImageClassification.from_pretrained(folder) for folder in (checkpoint, tmp_path / "back")]
    assert models[0].config.id2label == models[1].config.id2label
    for name, value in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], value), name


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["paint"],
        ["classify", "x.png"],
        ["classify", "--checkpoint", "x"],
        ["classify", "x.png", "--checkpoint", "x", "--top-k", "0"],
        ["classify", "x.png", "--checkpoint", "x", "--batch-size", "many"],
        ["convert", "a", "b"],
        ["convert", "a", "b", "--to", "keras"],
        ["info", "tiny", "small"],
        ["train"],
        ["evaluate", "digits"],
        ["export", "x"],
        ["train", "digits", "--strategy", "zero"],
        ["train", "digits", "--dtype", "float8"],
        ["train", "digits", "--variant", "huge"],
        ["train", "digits", "--variant", "tiny", "--config", "x"],
        ["train", "digits", "--holdout", "1"],
        ["train", "digits", "--lr", "nan"],
    ],
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert "usage: convnext-fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["classify"], ["convert"], ["info"], ["train"], ["evaluate"], ["export"]]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    assert exit.value.code == 0
    assert f"usage: {' '.join(['convnext-fast', *command])}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["classify", "x.png", "--checkpoint", "/no/such/folder"], "/no/such/folder"),
        (["convert", "/no/such/folder", "out", "--to", "timm"], "/no/such/folder"),
        (["info", "/no/such/folder"], "/no/such/folder"),
        (["demo", "--device", "abacus"], "device 'abacus' is not available"),
        (["train", "/no/such/folder", "--variant", "atto"], "/no/such/folder is not a folder"),
        (["evaluate", "digits", "--checkpoint", "/no/such/folder"], "/no/such/folder"),
        (["export", "/no/such/folder", "x.onnx"], "/no/such/folder"),
    ],
)
def test_a_failure_is_one_line_and_status_1(run, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*argv)
    assert (status, out) == (1, "")
    assert err.startswith("convnext-fast: error: ")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("module", "argv"), [("rich.console", ["info"]), ("rich.console", ["demo"]), ("sklearn.datasets", ["demo"])]
)
def test_a_missing_extra_is_named(run, monkeypatch, module, argv):
    monkeypatch.setitem(sys.modules, module, None)
    status, out, err = run(*argv)
    assert (status, out) == (1, "")
    assert "pip install -e '.[demo]'" in err


def test_the_installed_command_runs_without_rich_for_scripts(checkpoint, images):
    code = "import sys; sys.modules['rich'] = None; from convnext_fast.cli import main; sys.exit(main())"
    arguments = ["classify", "-", str(images / "gone.png"), "--checkpoint", str(checkpoint), "--json", "--top-k", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], input=(images / "a.png").read_bytes(), capture_output=True
    )
    assert done.returncode == 1
    assert records(done.stdout.decode())[0]["predictions"][0]["label"] == expected(checkpoint, images / "a.png")[0][0]
    assert b"gone.png: No such file" in done.stderr


def test_a_broken_pipe_is_not_a_crash():
    command = subprocess.Popen(
        [sys.executable, "-m", "convnext_fast", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    command.stdout.close()
    error = command.stderr.read().decode()
    assert command.wait(timeout=120) == 1
    assert error == ""


def test_damaged_exif_is_ignored_and_other_damage_is_an_error(tmp_path):
    entries = struct.pack("<HHHI4s", 2, 256, 2, 3, b"32") + struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    PIL.Image.new("RGB", (20, 40)).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0" + entries + b"\0" * 4)
    with pytest.raises(struct.error):
        PIL.ImageOps.exif_transpose(PIL.Image.open(tmp_path / "x.jpg"))
    assert open_image(tmp_path / "x.jpg", 3).size == (20, 40)
    (tmp_path / "x.qoi").write_bytes(b"qoif" + bytes([0, 0, 0, 5] * 2) + b"\x03\0\xfe")
    with pytest.raises(ValueError, match="broken image"):
        open_image(tmp_path / "x.qoi", 3)


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "<u2"), ("I;16B", ">u2")])
def test_sixteen_bits_in_both_byte_orders(mode, kind):
    image = PIL.Image.frombytes(mode, (3, 1), np.array([0, 256 * 7, 65535]).astype(kind).tobytes())
    assert np.asarray(to_channels(image, 1)).tolist() == [[0, 7, 255]]
