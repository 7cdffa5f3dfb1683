import _thread
import json
import math
import signal
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from training_support import Quiet, new_trainer, processor, small_images, stored, tiny_config, write_folder

import convnext_fast
from convnext_fast import ConvNext, cli
from convnext_fast.images.files import open_image
from convnext_fast.images.processor import ConvNextImageProcessor
from convnext_fast.training import evaluate
from convnext_fast.training.command import Start, build, evaluate_checkpoint
from convnext_fast.training.data import evaluation_loader
from convnext_fast.training.image_set import load_folder
from convnext_fast.training.optim import layer_ids

CPU = torch.device("cpu")


@pytest.fixture
def image_folder(tmp_path):
    return write_folder(tmp_path / "data")


def run_to_the_end(output, **options):
    trainer = new_trainer(output, validation=small_images(10), **options)
    reporter = Quiet()
    return trainer.run(reporter), reporter.losses, load_file(output / "model" / "model.safetensors")


@pytest.mark.parametrize(("stop", "save_every"), [(4, 0), (2, 1), (5, 2)])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, stop, save_every):
    history, losses, weights = run_to_the_end(tmp_path / "whole")
    trainer = new_trainer(tmp_path / "cut", validation=small_images(10), save_every=save_every)
    first = Quiet(until=stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(first)
    trainer = new_trainer(tmp_path / "cut", validation=small_images(10), save_every=save_every, resume=True)
    second = Quiet()
    resumed = trainer.run(second)
    assert second.first == trainer.steps - len(second.losses) > 0
    assert first.losses | second.losses == losses
    assert len(losses) == 6
    untimed = [
        [{k: v for k, v in record.items() if k != "images_per_second"} for record in h] for h in (history, resumed)
    ]
    assert untimed[0] == untimed[1]
    again = load_file(tmp_path / "cut" / "model" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "cut" / "history.json").read_text())["epochs"] == resumed


def test_training_learns_and_the_average_is_scored_and_exported(tmp_path):
    history, _, weights = run_to_the_end(tmp_path, epochs=6, drop_path=0.0, mixup=0.0, cutmix=0.0)
    assert history[-1]["accuracy"] == 1.0
    assert history[-1]["loss"] < history[0]["loss"]
    state = stored(tmp_path)
    assert torch.equal(weights["classifier.weight"], state["model_ema"]["head.fc.weight"])
    assert not torch.equal(weights["classifier.weight"], state["model"]["head.fc.weight"])
    model = ConvNext.from_pretrained(tmp_path / "model")
    images = small_images(10)
    score = evaluate(model, evaluation_loader(images, processor(), channels=1, batch_size=3), CPU)
    assert score.accuracy == history[-1]["accuracy"]
    assert score.loss == pytest.approx(history[-1]["validation_loss"], rel=1e-5)


def test_one_step_is_adamw_on_the_smoothed_cross_entropy(tmp_path):
    options = {"mixup": 0.0, "cutmix": 0.0, "ema": 0.0, "drop_path": 0.0, "augmentation": "none", "clip_grad": 0.1}
    trainer = new_trainer(tmp_path, warmup_epochs=0, label_smoothing=0.2, layer_decay=0.9, **options)
    torch.manual_seed(0)
    model = ConvNext(tiny_config(), fused=False)
    (pixels, targets, _), *_ = trainer.loader
    trainer.model.train()
    loss, lr = trainer._train_step(trainer.model, pixels, targets, Quiet())
    log = model(pixels).log_softmax(-1)
    expected = -((0.8 * targets + 0.2 / 2) * log).sum(-1).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    layers, last = layer_ids(model), 4
    moved = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        rate = lr * 0.9 ** (last - layers[name])
        grad = parameter.grad * min(1.0, 0.1 / total)
        decayed = parameter * (1 - rate * 0.05 * (parameter.dim() > 1))
        # The first step of Adam is g / (|g| + ε), which is ill-conditioned where g is about ε.
        clear = grad.abs() > 1e-5
        step = decayed - rate * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(moved[name][clear], step[clear], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_gradient_is_clipped_at_its_own_scale(tmp_path, dtype):
    """The first moment after one step is a tenth of the clipped gradient, not of one times the loss scale."""
    trainer = new_trainer(tmp_path, dtype=dtype, clip_grad=0.01)
    batch, *_ = trainer.loader
    trainer.model.train()
    while not trainer.optimizer.state:  # the scaler leaves steps out until its scale fits
        trainer._train_step(trainer.model, batch.pixels, batch.targets, Quiet())
    state = trainer.optimizer.state.values()
    norm = torch.cat([moment["exp_avg"].flatten() for moment in state]).norm()
    assert norm.item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_bf16_trains_float32_weights(tmp_path):
    trainer = new_trainer(tmp_path / "a", dtype="bfloat16", drop_path=0.0)
    narrow, exact = Quiet(), Quiet()
    trainer.run(narrow)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    new_trainer(tmp_path / "b", drop_path=0.0).run(exact)
    assert narrow.losses != exact.losses
    assert narrow.losses[0] == pytest.approx(exact.losses[0], rel=0.02)


def test_a_nan_loss_stops_the_run_before_it_is_saved(tmp_path):
    model = ConvNext(tiny_config())
    with torch.no_grad():
        model.head.fc.bias[0] = math.inf
    with pytest.raises(ValueError, match="the loss is nan at step 0 of 6"):
        new_trainer(tmp_path, model=model).run(Quiet())
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_an_image_that_cannot_be_read_is_named(image_folder, tmp_path):
    broken = image_folder / "dark" / "0.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    images = load_folder(image_folder)
    with pytest.raises(ValueError, match=r"dark/0\.png: broken image"):
        new_trainer(tmp_path / "run", images=images).run(Quiet())
    with pytest.raises(ValueError, match=r"dark/0\.png: broken image"):
        evaluate(ConvNext(tiny_config()), evaluation_loader(images, processor(), channels=1, batch_size=4), CPU)


def test_model_and_images_must_have_the_same_classes(tmp_path):
    with pytest.raises(ValueError, match="the model has 2 classes, the images 3"):
        new_trainer(tmp_path, images=small_images(classes=("a", "b", "c")))


@pytest.fixture
def config_file(tmp_path):
    tiny_config(num_channels=3, image_size=8).save_pretrained(tmp_path / "config")
    return tmp_path / "config" / "config.json"


def train(data, output, *arguments):
    fixed = ["--epochs", "2", "--batch-size", "8", "--warmup-epochs", "1", "--lr", "1e-2", "--device", "cpu"]
    return cli.main(["train", str(data), "--output", str(output), *fixed, *map(str, arguments)])


def test_an_interrupted_run_says_how_to_resume(image_folder, config_file, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "checkpoint.pt"

    def interrupt():
        while not checkpoint.exists():
            time.sleep(0.01)
        _thread.interrupt_main()

    # A shell's background jobs start with the signal ignored, and then nothing interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        assert train(image_folder, tmp_path / "run", "--config", config_file, "--epochs", "300") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"--resume continues from {checkpoint}" in capsys.readouterr().err
    assert stored(tmp_path / "run")["step"] % 2 == 0


def test_fine_tuning_keeps_the_classifier_only_for_the_same_classes(image_folder, config_file, tmp_path):
    assert train(image_folder, tmp_path / "first", "--config", config_file, "--epochs", "1") == 0
    weights = load_file(tmp_path / "first" / "model" / "model.safetensors")
    tuned = ["--checkpoint", tmp_path / "first" / "model", "--lr", "0", "--min-lr", "0", "--ema", "0", "--epochs", "1"]
    assert train(image_folder, tmp_path / "same", *tuned) == 0
    same = load_file(tmp_path / "same" / "model" / "model.safetensors")
    assert all(torch.equal(same[name], value) for name, value in weights.items())
    (image_folder / "light").rename(image_folder / "bright")
    assert train(image_folder, tmp_path / "other", *tuned) == 0
    other = load_file(tmp_path / "other" / "model" / "model.safetensors")
    changed = {name for name, value in weights.items() if not torch.equal(other[name], value)}
    assert changed == {"classifier.weight", "classifier.bias"}
    model = ConvNext.from_pretrained(tmp_path / "other" / "model")
    assert model.config.id2label == {0: "bright", 1: "dark"}
    assert ConvNextImageProcessor.from_pretrained(tmp_path / "other" / "model").size == {"shortest_edge": 8}


def test_from_a_folder_of_images_to_an_exported_model(image_folder, config_file, tmp_path, capsys, monkeypatch):
    """Train, be interrupted, resume, evaluate, classify, export; each command reads what the one before has written."""
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    monkeypatch.setenv("COLUMNS", "200")
    data, run = tmp_path / "set", tmp_path / "run"
    data.mkdir()
    image_folder.rename(data / "train")
    write_folder(data / "val", count=6)
    options = ["--config", config_file, "--mixup", "0", "--cutmix", "0", "--ema", "0", "--epochs", "8"]
    assert train(data, run, *options) == 0
    capsys.readouterr()
    assert train(data, run, *options) == 1
    assert "already holds a run: resume it, or choose another folder" in capsys.readouterr().err
    assert train(data, run, *options, "--resume") == 0
    last = json.loads((run / "history.json").read_text())["epochs"][-1]
    capsys.readouterr()
    assert cli.main(["evaluate", str(data), "--checkpoint", str(run / "model"), "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["images"] == 6
    assert score["accuracy"] == last["accuracy"]
    assert score["loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    assert cli.main(["evaluate", str(data / "val"), "--checkpoint", str(run / "model")]) == 0
    assert f"6 images: accuracy {score['accuracy']:.2%}, loss {score['loss']:.4f}" in capsys.readouterr().out
    image = next((data / "val" / "light").iterdir())
    assert cli.main(["classify", str(image), "--checkpoint", str(run / "model"), "--json"]) == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    assert cli.main(["export", str(run / "model"), str(tmp_path / "model.onnx")]) == 0
    assert (
        "pixel_values (N, 3, 8, 8) to logits (N, 2); onnxruntime differs from the model by" in capsys.readouterr().out
    )
    pixels = ConvNextImageProcessor.from_pretrained(run / "model")(open_image(image, 3)).pixel_values[0]
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": pixels[None].astype("float32")})
    scores = torch.from_numpy(logits)[0].softmax(0)
    assert {p["index"]: p["score"] for p in predictions} == pytest.approx(dict(enumerate(scores.tolist())), abs=1e-5)


def test_classes_are_matched_by_name(image_folder, config_file, tmp_path, capsys):
    arguments = ["--config", config_file, "--mixup", "0", "--cutmix", "0", "--ema", "0", "--epochs", "8"]
    assert train(image_folder, tmp_path / "run", *arguments) == 0
    model = ConvNext.from_pretrained(tmp_path / "run" / "model")
    (tmp_path / "data" / "light").rename(tmp_path / "data" / "bright")
    capsys.readouterr()
    assert cli.main(["evaluate", str(image_folder), "--checkpoint", str(tmp_path / "run" / "model")]) == 1
    assert "has the classes ['bright'], which the model does not have" in capsys.readouterr().err
    (tmp_path / "data" / "bright").rename(tmp_path / "data" / "light")
    # The same model with its classes in another order has the same score.
    scores = []
    for order in ([0, 1], [1, 0]):
        with torch.no_grad():
            for parameter in model.head.fc.parameters():
                parameter.copy_(parameter[order])
        names = [model.config.id2label[i] for i in order]
        model.config = model.config.amended(id2label=dict(enumerate(names)))
        model.save_pretrained(tmp_path / "other", format="transformers")
        ConvNextImageProcessor.from_pretrained(tmp_path / "run" / "model").save_pretrained(tmp_path / "other")
        assert cli.main(["evaluate", str(image_folder), "--checkpoint", str(tmp_path / "other"), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0]["accuracy"] > 0.6
    assert cli.main(["evaluate", "digits", "--checkpoint", str(tmp_path / "other")]) == 1
    assert "has 2 classes, 'light' first: expected the ten digits" in capsys.readouterr().err


def test_score_of_the_included_model(capsys):
    digits = Path(convnext_fast.__file__).parent / "assets" / "digits"
    assert cli.main(["evaluate", "digits", "--checkpoint", str(digits)]) == 0
    assert "596 images: accuracy 98.83%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "need one of --variant, --config and --checkpoint"),
        (["--variant", "atto", "--batch-size", "64"], "batch_size is 64: expected at most 18"),
        (["--variant", "atto", "--layer-decay", "2"], "layer_decay is 2.0: expected a number in (0, 1]"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--checkpoint", "/nowhere"], "/nowhere"),
    ],
)
def test_an_error_for_what_cannot_be_trained(image_folder, tmp_path, capsys, arguments, message):
    assert train(image_folder, tmp_path / "run", *arguments) == 1
    assert message in capsys.readouterr().err


def test_a_model_of_many_classes_is_evaluated_as_it_was_in_training(tmp_path):
    """Their names sort otherwise than their indices, in the folder as in config.json."""
    classes = tuple(f"c{i}" for i in range(12))
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        for part, count in (("train", 4), ("val", 2)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                array = rng.integers(0, 12, (8, 8), np.uint8) + np.uint8(20 * i)
                PIL.Image.fromarray(array).save(tmp_path / part / name / f"{number}.png")
    training = load_folder(tmp_path / "train")
    validation = load_folder(tmp_path / "val", training.classes)
    config = tiny_config(num_labels=12, id2label=dict(enumerate(training.classes)))
    loader = evaluation_loader(validation, processor(), channels=1, batch_size=8, workers=0)
    trainer = new_trainer(
        tmp_path / "run",
        images=training,
        validation=validation,
        model=ConvNext(config),
        epochs=4,
        mixup=0.0,
        cutmix=0.0,
    )
    record = trainer.run(Quiet())[-1]
    assert record["validation_loss"] == pytest.approx(evaluate(trainer.result, loader, torch.device("cpu")).loss)
    model = str(tmp_path / "run" / "model")
    score, count = evaluate_checkpoint(str(tmp_path), model, batch_size=8, workers=0, device=torch.device("cpu"))
    assert count == 24
    assert score.loss == pytest.approx(record["validation_loss"], rel=1e-5)
    assert score.accuracy == record["accuracy"]
    tuned, _ = build(Start(checkpoint=model), training.classes, trainer.options, None, digits=False)
    assert torch.equal(tuned.head.fc.weight, trainer.result.head.fc.weight)
