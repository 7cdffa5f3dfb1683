"""from_pretrained and save_pretrained in every format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from keras_support import CLASSES, array, config_of, error, images, in_pytorch, twins
from safetensors import safe_open
from support import FLOAT32_BOUND

import convnext_fast
from convnext_fast import ConvNext, ConvNextForImageClassification, TFConvNextForImageClassification, TFConvNextModel
from convnext_fast.checkpoints.formats import FORMATS

X = images()


def same(keras_model, model):
    state = {name: p.detach().numpy() for name, p in model.named_parameters()}
    found = in_pytorch(keras_model, [array(v) for v in keras_model.trainable_variables])
    return found.keys() == state.keys() and all(np.array_equal(found[name], state[name]) for name in state)


def equal(twin, model):
    return all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("version", "format"), [(v, f) for v in (1, 2) for f in FORMATS if (v, f) != (2, "torchvision")]
)
def test_formats_of_pytorch(version, format, tmp_path):
    model, keras_model = twins(tmp_path / "transformers", version=version, layer_norm_eps=1e-6)
    timm = ConvNext.from_pretrained(tmp_path / "transformers")
    convnext_fast.models.convnext.save_model(timm, tmp_path / format, format=format)
    assert same(type(keras_model).from_pretrained(tmp_path / format, from_pt=True), model)
    assert same(type(keras_model).from_pretrained(tmp_path / format / "model.safetensors"), model)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_own_folders(headless, safe, version, tmp_path):
    model, keras_model = twins(tmp_path / "pytorch", headless, version=version)
    (tmp_path / "saved").mkdir()
    for stale in ("model.safetensors", "tf_model.h5"):
        (tmp_path / "saved" / stale).write_bytes(b"old")
    keras_model.save_pretrained(tmp_path / "saved", safe_serialization=safe)
    file = "model.safetensors" if safe else "tf_model.h5"
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", file]
    assert same(type(keras_model).from_pretrained(tmp_path / "saved"), model)
    twin = type(model).from_pretrained(tmp_path / "saved")
    assert equal(twin, model)
    assert twin.config == type(model).from_pretrained(tmp_path / "pytorch").config
    if safe:
        with safe_open(tmp_path / "saved" / file, "np") as tensors:
            assert tensors.metadata() == {"format": "tf"}
            name = f"{keras_model.base_model_prefix}/encoder/stages.1/downsampling_layer.1/kernel:0"
            assert name in tensors.keys()  # noqa: SIM118


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("safe", [False, True])
def test_files_in_parts(safe, version, tmp_path):
    model, keras_model = twins(tmp_path / "pytorch", version=version)
    keras_model.save_pretrained(tmp_path / "saved", safe_serialization=safe, max_shard_size=4000)
    parts = sorted(path.name for path in (tmp_path / "saved").iterdir())
    name, suffix = ("model", "safetensors") if safe else ("tf_model", "h5")
    count = len(parts) - 2
    assert count > 2
    numbered = [f"{name}-{i + 1:05d}-of-{count:05d}.{suffix}" for i in range(count)]
    assert parts == sorted(["config.json", f"{name}.{suffix}.index.json", *numbered])
    for cls in CLASSES[version, False]:
        twin, info = cls.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(info.values())
        assert same(twin, model) if cls is not type(model) else equal(twin, model)
    keras_model.save_pretrained(tmp_path / "saved", safe_serialization=not safe)
    whole = "tf_model.h5" if safe else "model.safetensors"
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", whole]
    with pytest.raises(ValueError, match="the size is '5 apples'"):
        keras_model.save_pretrained(tmp_path / "saved", max_shard_size="5 apples")


def test_low_precision_is_saved(tmp_path):
    twins(tmp_path)
    model = TFConvNextForImageClassification.from_pretrained(tmp_path, dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    twin = ConvNextForImageClassification.from_pretrained(tmp_path / "saved")
    assert twin.dtype == torch.bfloat16
    assert same(model, twin.float())
    with pytest.raises(ValueError, match="bfloat16"):
        model.save_pretrained(tmp_path / "h5")


def test_another_number_of_classes(tmp_path):
    model, _ = twins(tmp_path)
    with pytest.raises(ValueError, match="does not fit TFConvNextForImageClassification"):
        TFConvNextForImageClassification.from_pretrained(tmp_path, num_labels=7)
    with pytest.warns(UserWarning, match="newly initialises what has another size"):
        other = TFConvNextForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert tuple(other(X).logits.shape) == (3, 7)
    base = TFConvNextModel.from_pretrained(tmp_path)
    assert error(base(X).pooler_output, model.convnext(torch.from_numpy(X)).pooler_output) < FLOAT32_BOUND
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="newly initialises classifier"):
        TFConvNextForImageClassification.from_pretrained(tmp_path / "base")


def test_options(tmp_path):
    twins(tmp_path)
    model = TFConvNextForImageClassification.from_pretrained(tmp_path, drop_path_rate=0.3, name="mine")
    assert (model.config.drop_path_rate, model.name) == (0.3, "mine")
    with pytest.raises(TypeError, match="from_pretrained got wrong"):
        TFConvNextForImageClassification.from_pretrained(tmp_path, wrong=1)
    with pytest.raises(FileNotFoundError):
        TFConvNextForImageClassification.from_pretrained(tmp_path / "missing")


@pytest.mark.parametrize("version", [1, 2])
def test_another_version_is_refused(version, tmp_path):
    twins(tmp_path, version=version)
    with pytest.raises(ValueError, match=f"holds a ConvNeXt V{version}: expected V{3 - version} for TFConvNext"):
        CLASSES[3 - version, True][1].from_pretrained(tmp_path)


@pytest.mark.parametrize("option", [{"torch_dtype": "float16"}, {"device_map": "auto"}, {"max_memory": {"cpu": 1}}])
def test_options_of_the_pytorch_models_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match=next(iter(option))):
        TFConvNextForImageClassification.from_pretrained(tmp_path, **option)


def test_arguments_have_transformers_names(tmp_path):
    model, keras_model = twins(tmp_path)
    keras_model.save_pretrained(save_directory=tmp_path / "saved")
    assert same(
        TFConvNextForImageClassification.from_pretrained(pretrained_model_name_or_path=tmp_path / "saved"), model
    )
    with pytest.raises(TypeError, match="positional"):
        keras_model.save_pretrained(tmp_path / "saved", True)


def test_weights_of_keras_applications(tmp_path):
    """Keras's own model on this backend, with its weights in the form in which it downloads them."""
    h5py = pytest.importorskip("h5py")
    from keras.src.applications.convnext import ConvNeXt
    from keras.src.legacy.saving import legacy_h5_format

    theirs = ConvNeXt(
        depths=(1, 1, 2, 1),
        projection_dims=(4, 8, 12, 16),
        default_size=32,
        name="convnext_tiny",
        include_preprocessing=False,
        weights=None,
        input_shape=(32, 32, 3),
        classes=5,
        classifier_activation=None,
    )
    rng = np.random.default_rng(0)
    for variable in theirs.weights:
        variable.assign(
            rng.standard_normal(variable.shape) / (variable.shape[-2] if len(variable.shape) > 1 else 1) ** 0.5
        )
    with h5py.File(tmp_path / "convnext_tiny.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, theirs)
    x = images(size=(32, 32))
    ours = TFConvNextForImageClassification.from_pretrained(tmp_path / "convnext_tiny.h5")
    assert error(ours(x).logits, array(theirs(x.transpose(0, 2, 3, 1)))) < FLOAT32_BOUND


def test_new_models_start_as_pytorchs():
    config = config_of(hidden_sizes=(64, 128), initializer_range=0.5, layer_scale_init_value=0.25)
    model = TFConvNextForImageClassification(config)
    values = in_pytorch(model, [array(v) for v in model.trainable_variables])
    for name, value in values.items():
        if value.ndim > 1 and value.size > 1000:
            assert abs(value.mean()) < 0.05, name
            assert 0.45 < value.std() < 0.55, name
            assert np.abs(value).max() <= 2, name
        elif value.ndim == 1:
            scale = "layer_scale" in name
            assert set(value) == {0.25 if scale else float(name.endswith("norm.weight") or ".0.weight" in name)}, name
