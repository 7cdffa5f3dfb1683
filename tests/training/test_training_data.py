import math
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from training_support import processor, small_images, tiny_config, write_folder

from convnext_fast import ConvNext
from convnext_fast.training import TrainingOptions, load_data
from convnext_fast.training.augment import augment, mix_pairs
from convnext_fast.training.data import EpochSampler, training_loader
from convnext_fast.training.ema import Ema
from convnext_fast.training.image_set import load_evaluation_folder, load_folder, split
from convnext_fast.training.optim import layer_ids, learning_rate, parameter_groups, set_learning_rate


def loader(images, sampler, *, mixup=0.8, cutmix=1.0, workers=0, augmentation="crop"):
    return training_loader(
        images,
        processor(),
        sampler,
        channels=1,
        augmentation=augmentation,
        mixup=mixup,
        cutmix=cutmix,
        workers=workers,
        pin_memory=False,
    )


@pytest.fixture
def image_folder(tmp_path):
    return write_folder(tmp_path / "data")


# Order, batches, mixing


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_together_see_the_images_of_one_in_the_same_order(world):
    one = EpochSampler(22, 4, seed=5)
    parts = [EpochSampler(22, 4, seed=5, rank=rank, world=world) for rank in range(world)]
    for sampler in (one, *parts):
        sampler.epoch = 2
    joint = [[key for batch in batches for key in batch] for batches in zip(*parts, strict=True)]
    assert joint == list(one)
    seen = [key.index for batch in joint for key in batch]
    assert len(seen) == len(set(seen)) == 20
    assert seen != sorted(seen)
    one.epoch = 3
    assert [key.index for batch in one for key in batch] != seen


def test_an_epoch_resumes_at_any_batch():
    sampler = EpochSampler(20, 4, seed=0)
    whole = list(sampler)
    sampler.first = 3
    assert list(sampler) == whole[3:]


@pytest.mark.parametrize("world", [1, 2])
def test_batches_depend_neither_on_loader_workers_nor_on_processes(world):
    images = small_images()
    expected = list(loader(images, EpochSampler(24, 8, seed=1)))
    loaders = [loader(images, EpochSampler(24, 8, 1, rank, world), workers=2 - world % 2) for rank in range(world)]
    for whole, *parts in zip(expected, *loaders, strict=True):
        assert torch.equal(whole.pixels, torch.cat([part.pixels for part in parts]))
        assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
    assert any(0 < target < 1 for batch in expected for target in batch.targets[:, 0])


def test_odd_too_large_and_indivisible_batches_are_refused():
    with pytest.raises(ValueError, match="batch is 3: expected an even number"):
        loader(small_images(), EpochSampler(24, 6, 0, world=2))
    with pytest.raises(ValueError, match="batch_size is 25: expected at most 24"):
        EpochSampler(24, 25, 0)
    with pytest.raises(ValueError, match="batch_size is 9: expected a multiple of 2"):
        EpochSampler(24, 9, 0, world=2)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_the_target_is_the_share_of_each_image(mixup, cutmix):
    pixels = np.zeros((16, 3, 12, 10), np.float32)
    pixels[::2] = 1.0
    targets = np.eye(2, dtype=np.float32)[[1, 0] * 8]
    mix_pairs(pixels, targets, mixup, cutmix, np.random.default_rng)
    np.testing.assert_allclose(pixels.mean((1, 2, 3)), targets[:, 1], atol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    assert len(np.unique(targets[:, 1].round(4))) > 4
    binary = np.isin(pixels, (0.0, 1.0)).all((1, 2, 3))
    assert binary.all() if not mixup else not binary.all() or cutmix


def test_without_mixing_nothing_changes():
    pixels, targets = np.random.rand(4, 1, 3, 3), np.eye(4)
    before = pixels.copy()
    mix_pairs(pixels, targets, 0.0, 0.0, np.random.default_rng)
    assert (pixels == before).all()
    assert (targets == np.eye(4)).all()


def test_a_random_crop_stays_inside_and_is_mirrored_half_the_time():
    columns = np.tile(np.arange(40, 80, dtype=np.uint8), (30, 1))
    crops = []
    for i in range(60):
        image = augment(
            PIL.Image.fromarray(columns), "crop", 16, PIL.Image.Resampling.BILINEAR, np.random.default_rng(i)
        )
        crops.append(np.asarray(image).astype(int))
    assert all(crop.shape == (16, 16) and crop.min() >= 40 and crop.max() < 80 for crop in crops)
    mirrored = sum(crop[0, 0] > crop[0, -1] for crop in crops)
    assert 15 < mirrored < 45
    assert len({crop.tobytes() for crop in crops}) > 50


def test_an_affine_change_is_small():
    dot = np.zeros((32, 32), np.uint8)
    dot[15:17, 15:17] = 255
    for i in range(30):
        image = augment(PIL.Image.fromarray(dot), "affine", 32, PIL.Image.Resampling.BICUBIC, np.random.default_rng(i))
        mass = np.asarray(image).astype(float)
        y, x = (mass * np.indices(mass.shape)).sum((1, 2)) / mass.sum()
        assert max(abs(y - 15.5), abs(x - 15.5)) < 4.5
        assert mass.sum() > 0.5 * dot.sum()


# Images


def test_a_folder_for_each_class(image_folder):
    training, validation = load_data(image_folder, 0.2, seed=0)
    assert training.classes == ("dark", "light")
    assert (len(training), len(validation)) == (16, 4)
    assert sorted(validation.labels) == [0, 0, 1, 1]
    assert not set(training.pictures) & set(validation.pictures)
    assert load_data(image_folder, 0.2, seed=0)[1].pictures == validation.pictures
    assert load_data(image_folder, 0.0, seed=0)[1] is None


def test_train_and_val_folders(image_folder, tmp_path):
    (tmp_path / "set").mkdir()
    image_folder.rename(tmp_path / "set" / "train")
    dark = tmp_path / "set" / "val" / "dark"
    dark.mkdir(parents=True)
    PIL.Image.new("L", (9, 9)).save(dark / "a.png")
    training, validation = load_data(tmp_path / "set", 0.5, seed=0)
    assert (len(training), len(validation), validation.classes) == (20, 1, ("dark", "light"))
    (dark.parent / "grey").mkdir()
    with pytest.raises(ValueError, match=r"classes \['grey'\], which the model does not have"):
        load_data(tmp_path / "set", 0.5, seed=0)


def test_folders_without_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_data(tmp_path / "nowhere", 0.1, 0)
    with pytest.raises(ValueError, match="has 0 folders: expected one for each class"):
        load_data(tmp_path, 0.1, 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="a holds no image"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="class 'dark' has 1 images: too few to hold out"):
        split(small_images(2), 0.1, 0)


# Optimiser, average, options


def test_each_parameter_is_in_one_group_at_its_layers_rate():
    model = ConvNext(tiny_config())
    layers = layer_ids(model)
    expected = [
        ("stem.0.weight", 0),
        ("stages.0.blocks.0.mlp.fc1.weight", 1),
        ("stages.1.downsample.1.weight", 2),
        ("stages.1.blocks.0.gamma", 2),
        ("stages.1.blocks.1.conv_dw.bias", 3),
        ("head.norm.weight", 4),
        ("head.fc.weight", 4),
    ]
    assert all(layers[name] == layer for name, layer in expected)
    groups = parameter_groups(model, 0.05, 0.5)
    parameters = dict(model.named_parameters())
    assert sorted(name for group in groups for name in group["names"]) == sorted(parameters)
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is parameters[name]
            assert group["lr_scale"] == 0.5 ** (4 - layers[name])
            assert group["weight_decay"] == (0.05 if parameter.dim() > 1 else 0.0)
    set_learning_rate(groups, 2.0)
    assert {group["lr"] for group in groups} == {2.0 * 0.5**i for i in range(5)}


def test_without_layer_decay_there_are_two_groups_and_frozen_parameters_are_left_out():
    model = ConvNext(tiny_config())
    model.stem.requires_grad_(False)
    groups = parameter_groups(model, 0.1, 1.0)
    assert len(groups) == 2
    assert all(group["lr_scale"] == 1 for group in groups)
    assert not any(name.startswith("stem") for group in groups for name in group["names"])


def test_the_learning_rate_warms_up_and_follows_half_a_cosine():
    options = TrainingOptions(epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, 5, options) for step in range(50)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(40) / 40)) / 2
    np.testing.assert_allclose(rates[10:], expected)
    assert learning_rate(0, 5, TrainingOptions(epochs=1, warmup_epochs=0, lr=1.0)) == 1.0


def test_the_average_follows_its_formula():
    model = ConvNext(tiny_config())
    ema = Ema(model, 0.5)
    mean = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        mean = {name: decay * mean[name] + (1 - decay) * value.double() for name, value in model.state_dict().items()}
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), mean[name], rtol=1e-5, atol=1e-5)
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_short_runs_warm_up_for_a_fifth():
    assert [TrainingOptions(epochs=n).warmup_epochs for n in (1, 2, 25, 300)] == [0.2, 0.4, 5.0, 5.0]
    assert TrainingOptions(epochs=2, warmup_epochs=0).warmup_epochs == 0


def test_integers_of_numpy_become_python_ones():
    """Resuming refuses a checkpoint that holds NumPy's."""
    options = TrainingOptions(epochs=np.int64(3), batch_size=np.int32(2), seed=np.int64(1))
    assert {type(getattr(options, name)) for name in ("epochs", "batch_size", "seed")} == {int}
    assert type(options.warmup_epochs) is float


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("epochs", 0, ValueError),
        ("epochs", 1.5, TypeError),
        ("batch_size", True, TypeError),
        ("lr", -1.0, ValueError),
        ("lr", math.nan, ValueError),
        ("lr", "1", TypeError),
        ("min_lr", 1.0, ValueError),
        ("warmup_epochs", 301, ValueError),
        ("betas", (0.9, 1.0), ValueError),
        ("layer_decay", 0.0, ValueError),
        ("layer_decay", 1.1, ValueError),
        ("clip_grad", math.inf, ValueError),
        ("drop_path", 1.0, ValueError),
        ("label_smoothing", 1.0, ValueError),
        ("ema", 1.0, ValueError),
        ("mixup", -0.1, ValueError),
        ("augmentation", "blur", ValueError),
        ("seed", -1, ValueError),
    ],
)
def test_a_bad_option_is_named(field, value, error):
    with pytest.raises(error, match=f"{field} is"):
        TrainingOptions(**{field: value})


def test_an_incomplete_layout_is_named(image_folder, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copytree(image_folder, tmp_path / "one" / "val")
    with pytest.raises(ValueError, match="holds val/ but no train/"):
        load_data(tmp_path / "one", 0.1, 0)
    (tmp_path / "one" / "val").rename(tmp_path / "one" / "train")
    with pytest.raises(ValueError, match="holds train/ but no val/"):
        load_evaluation_folder(tmp_path / "one", ("dark", "light"))
