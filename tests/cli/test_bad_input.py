"""Whatever a file, an option, a variable or the machine holds: commands end with a message, none with a traceback.

The commands run in this process. One that raises anything but SystemExit fails its test.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from training_support import tiny_config

from convnext_fast import ConvNextImageProcessor, cli
from convnext_fast.backends import environment
from convnext_fast.cli import arguments
from convnext_fast.images.files import FORMATS
from convnext_fast.models.huggingface import ConvNextForImageClassification
from convnext_fast.training.options import TrainingOptions

NAMES = ("ant", "bee", "cat")
WRONG = (
    None, True, -1, 0, 10**30, 10**400, 1e308, float("nan"), float("inf"), "x", "", [], [[]], [1, 2, 3], [10**9] * 4,
    ["x"], {}, {"0": []}, {"self": 1}, [-1] * 4,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = ConvNextForImageClassification(
        tiny_config(num_channels=3, num_labels=None, id2label=dict(enumerate(NAMES)))
    )
    model.save_pretrained(folder)
    ConvNextImageProcessor(size=8, crop_pct=1.0, do_convert_rgb=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with a folder for each class."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir()
        for i in range(2):
            PIL.Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command: (status, standard output, standard error), for which a traceback is a failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(*argv, stdin=b""):
        monkeypatch.setattr("sys.stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            status = cli.main(list(map(str, argv)))
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        assert status in (0, 1, 2), argv
        assert "Traceback" not in err
        if status == 0:
            assert "error:" not in err
        else:
            assert "error:" in err, argv
        return status, out, err

    return run


def copy_of(folder, target, **contents):
    """A copy of ``folder`` with other JSON files; its weights are links."""
    target.mkdir(exist_ok=True)
    for path in folder.iterdir():
        copy = target / path.name
        copy.unlink(missing_ok=True)
        key = path.name.split(".")[0]
        if key in contents:
            copy.write_text(contents[key])
        else:
            os.link(path, copy)
    return target


def commands_on(checkpoint, images, tmp_path):
    """A call of every command that takes a checkpoint."""
    image = images / "ant" / "0.png"
    return [
        ("info", checkpoint),
        ("classify", image, "--checkpoint", checkpoint),
        ("convert", checkpoint, tmp_path / "out.pth", "--to", "timm"),
        ("evaluate", images, "--checkpoint", checkpoint),
        ("train", images, "--config", checkpoint / "config.json", "--batch-size", 99, "--output", tmp_path / "run"),
        ("train", images, "--checkpoint", checkpoint, "--batch-size", 99, "--output", tmp_path / "run"),
        ("export", checkpoint, tmp_path / "out.txt"),
        ("bench", "--model", f"hf:{checkpoint}", "--batch-size", 1, "--image-size", 1, "--rounds", 1),
    ]


def wrong_fields(text):
    """JSON texts, each with another value for one field, and for one more."""
    fields = json.loads(text)
    for name, value in itertools.product([*fields, "self", "cls", "extra", "convnext_fast", "model_args"], WRONG):
        yield name, value, json.dumps(fields | {name: value})


# One in so many of the fields and values, in which each field and each value occurs.
ALL = pytest.param(1, marks=pytest.mark.thorough)


@pytest.mark.parametrize("every", [7, ALL])
def test_any_value_in_a_configuration(run, checkpoint, images, tmp_path, every):
    turns = itertools.cycle(range(7))
    wrong = wrong_fields((checkpoint / "config.json").read_text())
    for name, value, text in itertools.islice(wrong, 0, None, every):
        bad = copy_of(checkpoint, tmp_path / "bad", config=text)
        calls = commands_on(bad, images, tmp_path)
        in_turn = calls[-1 if name == "architectures" else next(turns)]
        for argv in (calls[0], in_turn):
            assert len(run(*argv)[2]) < 5000, (name, value)


@pytest.mark.parametrize("every", [3, ALL])
def test_any_value_in_the_options_of_an_image_processor(run, checkpoint, images, tmp_path, every):
    wrong = wrong_fields((checkpoint / "preprocessor_config.json").read_text())
    for _, _, text in itertools.islice(wrong, 0, None, every):
        bad = copy_of(checkpoint, tmp_path / "bad", preprocessor_config=text)
        run("classify", images / "ant" / "0.png", "--checkpoint", bad)


TEXTS = (
    b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", b'{"a": ' * 50000, b"[" * 200 + b"]" * 200,
    b'{"hidden_sizes": ' + b"[" * 300 + b"]" * 300 + b"}", b'{"depths": ' + b"9" * 5000 + b"}", b"{}",
)  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_any_text_as_a_file(run, checkpoint, images, tmp_path, name):
    bad = copy_of(checkpoint, tmp_path / "bad")
    for text in TEXTS:
        (bad / name).unlink()
        (bad / name).write_bytes(text)
        for argv in commands_on(bad, images, tmp_path)[:6]:
            run(*argv)


NAMES_OF_FILES = (
    "", "~", "~no-such-user", "~no-such-user/x.png", "[red]x[/red]", ":smile:", "x" * 5000, "a\0b", "\x1b[31mred",
    "\udc80", "é", "-", "--", ".", "/dev/null", "/proc/self/mem", "a\nb",
)  # fmt: skip


def test_any_name_of_a_file(run, checkpoint, images, tmp_path):
    for name in NAMES_OF_FILES:
        for argv in (
            ("info", name),
            ("classify", "--checkpoint", checkpoint, "--", name),
            ("classify", "--checkpoint", name, images / "ant" / "0.png"),
            ("convert", "--to", "timm", "--", name, "out"),
            ("evaluate", "--checkpoint", checkpoint, "--", name),
            ("train", "--config", name, "--", images),
            ("train", "--checkpoint", checkpoint, "--epochs", 1, "--batch-size", 99, "--output", name, "--", images),
            ("train", "--config", checkpoint, "--", name),
            ("export", "--", name, "x.onnx"),
            ("export", "--", checkpoint, name),
            ("demo", "--output", name),
            ("convert", "--to", "timm", "--", checkpoint, name),
        ):
            run(*argv)


def test_any_value_of_an_option(run, checkpoint, images):
    image = images / "ant" / "0.png"
    whole = ("-1", "0", "1e3", "x", "", "nan", "9" * 30, "9" * 5000, "٣x")
    for value in whole:
        for option in ("--top-k", "--batch-size"):
            run("classify", image, "--checkpoint", checkpoint, f"{option}={value}")
        for option in ("--batch-size", "--workers"):
            run("evaluate", images, "--checkpoint", checkpoint, f"{option}={value}") if value != "0" else None
        for option in ("--batch-size", "--image-size", "--rounds"):
            run("bench", "--model", "torchvision:none", f"{option}={value}")
        run("export", checkpoint, "x.txt", f"--image-size={value}")
        for field in (*TrainingOptions.__dataclass_fields__, "holdout", "image_size", "save_every"):
            if field not in ("betas", "epochs"):
                option = f"--{field.replace('_', '-')}={value}"
                run("train", images, "--checkpoint", checkpoint, "--batch-size=99", option, "--output=run")
    run("bench", "--model", "torchvision:none", "--batch-size", 1 << 20, "--image-size", 8192)


@pytest.mark.parametrize(
    "device",
    ["", "meta", "cpu:x", "cuda", "cuda:99", "mps", "xla", "hpu", "lazy", "vulkan", "fpga", "x", "privateuseone"],
)
def test_any_device(run, checkpoint, images, device):
    for argv in (
        ("classify", images / "ant" / "0.png", "--checkpoint", checkpoint),
        ("evaluate", images, "--checkpoint", checkpoint),
        ("train", images, "--checkpoint", checkpoint),
        ("bench", "--model", f"hf:{checkpoint}"),
        ("demo",),
    ):
        status, _, err = run(*argv, f"--device={device}")
        assert status == 1
        assert "is not available" in err


@pytest.mark.parametrize("wrong", [{"model_args": {"act_layer": ["gelu"]}}, {"label_names": [["a"], ["b"], ["c"]]}])
def test_lists_in_a_configuration_of_timm(run, checkpoint, images, tmp_path, wrong):
    bad = copy_of(checkpoint, tmp_path / "bad", config=json.dumps({"architecture": "convnext_tiny"} | wrong))
    for argv in commands_on(bad, images, tmp_path)[:3]:
        status, _, err = run(*argv)
        assert status == 1
        assert str(bad) in err


def test_hidden_states_that_are_none(run, checkpoint, images, tmp_path):
    fields = json.loads((checkpoint / "config.json").read_text())
    bad = copy_of(checkpoint, tmp_path / "bad", config=json.dumps(fields | {"output_hidden_states": "abc"}))
    status, _, err = run("info", bad)
    assert status == 1
    assert "output_hidden_states is 'abc': expected True, False or indices" in err


@pytest.mark.filterwarnings("ignore:.*newly initialises")
def test_no_classifier_to_export(run, checkpoint, tmp_path):
    ConvNextForImageClassification.from_pretrained(checkpoint).convnext.save_pretrained(tmp_path / "base")
    status, _, err = run("export", tmp_path / "base", tmp_path / "out.onnx")
    assert status == 1
    assert "head.fc.weight" in err
    assert "expected a checkpoint with a classifier" in err


def test_standard_input(run, checkpoint, images):
    good = str(images / "ant" / "0.png").encode()
    classify = ("classify", "-", "--checkpoint", checkpoint)
    assert run(*classify, stdin=None)[:2] == (1, "")
    for stdin in (b"", b"\0", b"a\0b\n", b"~no-such-user\n", b"\xff\xfe", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"x" * 5000):
        assert run(*classify, stdin=stdin)[0] == 1
    for bad in (b"~no-such-user", b"x" * 5000, b"a\0b", b"/proc/self/mem"):
        status, out, _ = run(*classify, stdin=bad + b"\n" + good)
        assert status == 1
        assert out.startswith(str(images))


def test_the_batch_goes_on(run, checkpoint, images):
    good = images / "ant" / "0.png"
    bad = ["", "~no-such-user", "x" * 5000, "missing", "/dev/null", images / "none"]
    status, out, err = run("classify", *bad, good, "--checkpoint", checkpoint, "--json")
    assert status == 1
    assert json.loads(out)["image"] == str(good)
    assert err.count("error:") == len(bad)


def test_a_folder_that_cannot_be_read(run, checkpoint, images, monkeypatch, tmp_path):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    status, out, err = run("classify", images, "--checkpoint", checkpoint, "--json")
    assert status == 1
    assert "bee: the folder cannot be read: Permission denied" in err
    assert len(out.splitlines()) == 4
    for argv in (("evaluate", images, "--checkpoint", checkpoint), ("train", images, "--checkpoint", checkpoint)):
        assert "Permission denied" in run(*argv)[2]


ODD_LABELS = ("[red]x[/red]", ":smile:", "\x1b[31mred\x07", "‮evil", "é", "\ud800", "a\nb")


def test_labels_are_text(run, checkpoint, images, tmp_path):
    fields = json.loads((checkpoint / "config.json").read_text())
    image = images / "ant" / "0.png"
    for label in ODD_LABELS:
        labels = {str(i): label + str(i) for i in range(3)}
        text = json.dumps(fields | {"id2label": labels, "label2id": None})
        bad = copy_of(checkpoint, tmp_path / "bad", config=text)
        status, out, _ = run("classify", image, "--checkpoint", bad)
        assert status == 0
        assert "\x1b" not in out + "".join(run("info", bad)[1:])
        assert "‮" not in out
        if label.isascii() and label.isprintable():
            assert f"{label}0" in out
        status, out, _ = run("classify", image, "--checkpoint", bad, "--json")
        assert {p["label"] for p in json.loads(out)["predictions"]} == set(labels.values())
        run("evaluate", images, "--checkpoint", bad)


def spoiled(checkpoint, target, **fields):
    """A checkpoint with other fields whose classifier's bias is NaN, not finite or as it was."""
    model = ConvNextForImageClassification.from_pretrained(checkpoint)
    bias = fields.pop("bias", None)
    if bias is not None:
        model.classifier.bias.data.fill_(bias)
    model.config = model.config.amended(**fields)
    model.save_pretrained(target)
    ConvNextImageProcessor(size=8, crop_pct=1.0, do_convert_rgb=True).save_pretrained(target)
    return target


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("bias", [float("nan"), float("inf")])
def test_json_whatever_the_model_says(run, checkpoint, images, tmp_path, bias):
    bad = spoiled(checkpoint, tmp_path / "bad", bias=bias)
    _, out, err = run("classify", images / "ant" / "0.png", "--checkpoint", bad, "--json")
    assert None in [p["score"] for p in strict(out)["predictions"]]
    assert "not all finite" in err
    _, out, err = run("evaluate", images, "--checkpoint", bad, "--json")
    assert strict(out)["loss"] is None
    assert "warning: the loss is" in err


def test_the_scores_of_a_regression_are_no_percentages(run, checkpoint, images, tmp_path):
    model = spoiled(checkpoint, tmp_path / "model", problem_type="regression", bias=12.5)
    status, out, _ = run("classify", images / "ant" / "0.png", "--checkpoint", model)
    assert status == 0
    assert "%" not in out
    assert "12." in out


def test_images_that_other_programs_would_draw(run, checkpoint, tmp_path, monkeypatch):
    def start(*argv, **options):
        raise AssertionError(f"started {argv}")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(os, "system", start)
    image = PIL.Image.new("RGB", (16, 16))  # Pillow 10 writes no smaller icons
    read = 0
    for suffix, format in PIL.Image.registered_extensions().items():
        if format not in PIL.Image.SAVE or format == "MPO":  # several images of JPEG
            continue
        data = io.BytesIO()
        for mode in ("RGB", "L", "1", "P"):
            try:
                image.convert(mode).save(data, format)
                break
            except (OSError, ValueError, KeyError, AttributeError):
                data = io.BytesIO()
        for name in ("x.png", f"x{suffix}"):
            (tmp_path / name).write_bytes(data.getvalue())
            status, _, err = run("classify", tmp_path / name, "--checkpoint", checkpoint)
            assert status == (0 if format in FORMATS else 1), (format, err)
            read += status == 0
    assert read > 20
    assert (
        run("classify", "-", "--checkpoint", checkpoint, stdin=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")[0]
        == 1
    )


def test_an_ascii_terminal(checkpoint, images, tmp_path):
    image = tmp_path / "é😀.png"
    image.write_bytes((images / "ant" / "0.png").read_bytes())
    program = (
        "import sys; from convnext_fast.cli import main\n"
        "for argv in (['train', '--help'], ['classify', '--help'], ['info'], ['info', sys.argv[1]],\n"
        "             ['classify', sys.argv[2], '--checkpoint', sys.argv[1]], ['info', sys.argv[2]]):\n"
        "    try: status = main(argv)\n"
        "    except SystemExit as exit: status = exit.code\n"
        "    print('status', status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, checkpoint, image],
        env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode("ascii")
    assert "\\udcc3\\udca9" in out
    assert [line[-1] for line in out.splitlines() if line.startswith("status")] == ["0", "0", "0", "0", "0", "1"]


@pytest.mark.parametrize(("request_", "words"), [("x", "expected one of auto"), ("triton", "need a GPU")])
def test_a_backend_that_is_not_there(run, checkpoint, images, tmp_path, monkeypatch, request_, words):
    monkeypatch.setattr(environment, "REQUEST", request_)
    calls = commands_on(checkpoint, images, tmp_path)
    for argv in [("demo",), calls[1], calls[3], calls[5], calls[6], calls[7]]:
        status, _, err = run(*argv, *(["--device", "cpu"] if argv[0] != "export" else []))
        assert status == 1
        assert words in err


def test_memory_that_is_not_there(run, checkpoint, images, monkeypatch):
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):

        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as context:
            context.setattr(ConvNextForImageClassification, "from_pretrained", fail)
            status, _, err = run("classify", images / "ant" / "0.png", "--checkpoint", checkpoint)
        assert status == 1
        assert "memory" in err
        assert len(err.splitlines()) == 1


def test_integers():
    assert arguments.at_least(1)("7") == 7
    with pytest.raises(Exception, match="at most 5"):
        arguments.at_least(1, 5)("6")
