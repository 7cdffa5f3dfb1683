"""TensorFlow's checkpoints: h5, safetensors, in parts, of keras.applications; written again; and damaged ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoint_cases import image, model_of, same
from safetensors.torch import save_file

from convnext_fast import (
    ConvNext,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2ForImageClassification,
    ConvNextV2Model,
)
from convnext_fast.checkpoints.load_save import load_checkpoint
from convnext_fast.checkpoints.tensorflow import h5_writer
from convnext_fast.cli.convert import convert_checkpoint

h5py = pytest.importorskip("h5py")


def tensorflow_tensors(model):
    """What TensorFlow holds of a PyTorch model, written out by the kinds of its layers."""
    found = {}
    for name, layer in model.named_modules():
        path = name.removeprefix(f"{model.base_model_prefix}.").replace(".", "/")
        for i in range(9):
            path = path.replace(f"/{i}", f".{i}")
        path = path if path == "classifier" else f"{model.base_model_prefix}/{path}"
        own = {key: value.detach().numpy() for key, value in layer.named_parameters(recurse=False)}
        if isinstance(layer, torch.nn.LayerNorm):
            own = {"gamma": own["weight"], "beta": own["bias"]}
        elif isinstance(layer, torch.nn.Linear):
            own = {"kernel": own["weight"].T, "bias": own["bias"]}
        elif isinstance(layer, torch.nn.Conv2d):
            own = {"kernel": np.einsum("oihw->hwio", own["weight"]), "bias": own["bias"]}
        found |= {f"{path}/{key}:0": np.ascontiguousarray(value) for key, value in own.items()}
    return found


def write_h5(path, arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


@pytest.fixture(
    params=[ConvNextForImageClassification, ConvNextModel, ConvNextV2ForImageClassification, ConvNextV2Model]
)
def model(request):
    return model_of(request.param)


@pytest.fixture
def folder(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    return tmp_path


def test_h5_of_keras(model, folder):
    """As Keras nests it: in the group of a layer, below the model's name."""
    arrays = {f"{k.split('/')[0]}/tf_any_name/{k}": v for k, v in tensorflow_tensors(model).items()}
    write_h5(folder / "tf_model.h5", arrays)
    assert same(type(model).from_pretrained(folder).state_dict(), model.state_dict())
    checkpoint = load_checkpoint(folder / "tf_model.h5")
    assert checkpoint.config.depths == model.config.depths
    assert checkpoint.format == "transformers"


def test_h5_in_parts(model, folder):
    arrays = tensorflow_tensors(model)
    names = {k: f"tf_model-0000{1 + i % 2}-of-00002.h5" for i, k in enumerate(arrays)}
    for file in set(names.values()):
        write_h5(folder / file, {k: v for k, v in arrays.items() if names[k] == file})
    index = {"weight_map": {f"tf_any_name/{k}": file for k, file in names.items()}}
    (folder / "tf_model.h5.index.json").write_text(json.dumps(index))
    assert same(type(model).from_pretrained(folder).state_dict(), model.state_dict())


def test_safetensors_of_tensorflow(model, folder):
    save_file({k: torch.from_numpy(v) for k, v in tensorflow_tensors(model).items()}, folder / "model.safetensors")
    assert same(type(model).from_pretrained(folder).state_dict(), model.state_dict())


def test_written_h5_is_as_keras_writes_it(model, tmp_path):
    h5_writer(model.state_dict())(tmp_path / "out.h5")
    expected = tensorflow_tensors(model)
    found = {}
    with h5py.File(tmp_path / "out.h5") as file:
        for layer in file.attrs["layer_names"]:
            for name in file[layer].attrs["weight_names"]:
                found[str(name).partition("/")[2]] = file[layer][name][()]
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found)


def test_long_lists_of_names_are_split(tmp_path, monkeypatch):
    model = model_of(ConvNextModel)
    monkeypatch.setattr("convnext_fast.checkpoints.tensorflow._MOST_ATTRIBUTE_BYTES", 1000)
    h5_writer(model.state_dict())(tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        attributes = file["convnext"].attrs
        names = [name for i in range(len(attributes)) for name in attributes[f"weight_names{i}"]]
        assert all(a.nbytes <= 1000 for a in attributes.values())
    assert len(names) == len(model.state_dict())


def test_convert_writes_h5(tmp_path):
    model = model_of(ConvNext)
    model.save_pretrained(tmp_path / "timm")
    convert_checkpoint(tmp_path / "timm", tmp_path / "tf_model.h5", "transformers")
    assert same(ConvNext.from_pretrained(tmp_path / "tf_model.h5").state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"tf_model\.h5 would hold the names of transformers"):
        convert_checkpoint(tmp_path / "timm", tmp_path / "tf_model.h5", "timm")
    with pytest.raises(ValueError, match=r"hidden_states_norms.*not written as h5"):
        h5_writer({"hidden_states_norms.stage1.weight": torch.ones(8)})
    with pytest.raises(ValueError, match="bfloat16"):
        h5_writer(model_of(ConvNextModel).bfloat16().state_dict())


def test_weights_of_keras_applications(tmp_path):
    """By layers that keras.applications names, each after the model."""
    model = model_of(ConvNext)
    layers = {"stem.0": "stem_conv", "stem.1": "stem_layernorm", "head.norm": "head_layernorm", "head.fc": "head_dense"}
    for i, stage in enumerate(model.stages):
        layers |= {
            f"stages.{i}.downsample.{k}": f"downsampling_{n}_{i - 1}" for k, n in ((0, "layernorm"), (1, "conv"))
        }
        for j in range(len(stage.blocks)):
            names = {"conv_dw": "depthwise_conv", "norm": "layernorm", "mlp.fc1": "pointwise_conv_1"}
            names |= {"mlp.fc2": "pointwise_conv_2", "gamma": "layer_scale"}
            layers |= {f"stages.{i}.blocks.{j}.{k}": f"stage_{i}_block_{j}_{n}" for k, n in names.items()}
    arrays = {}
    for key, value in model.state_dict().items():
        layer, _, leaf = key.rpartition(".")
        name = layers[key] if leaf == "gamma" else layers[layer]
        norm = layer in layers and "layernorm" in name
        leaf = {"gamma": "Variable", "weight": "gamma" if norm else "kernel", "bias": "beta" if norm else "bias"}[leaf]
        value = value.numpy()
        value = np.einsum("oihw->hwio", value) if value.ndim == 4 else value.T
        arrays[f"convnext_tiny_{name}/convnext_tiny_{name}/{leaf}:0"] = value
    write_h5(tmp_path / "convnext_tiny.h5", arrays)
    twin = ConvNext.from_pretrained(tmp_path / "convnext_tiny.h5")
    assert same(twin.state_dict(), model.state_dict())
    assert torch.equal(twin(image(model.config)), model(image(model.config)))


def _alias(file):
    file["convnext/a"] = h5py.SoftLink("/x")


def _elsewhere(file):
    file["convnext/a"] = h5py.ExternalLink("other.h5", "/x")


def _compressed(file):
    file.create_dataset("convnext/a", data=np.zeros(10_000, np.float32), compression="gzip")


def _unwritten(file):
    file.create_dataset("convnext/a", shape=(1 << 40,), dtype=np.float32)


def _integers(file):
    file["convnext/a"] = np.arange(3)


def _circle(file):
    file.create_group("convnext")["again"] = file["/"]


@pytest.mark.parametrize("spoil", [_alias, _elsewhere, _compressed, _unwritten, _integers, _circle])
def test_strange_h5_is_refused(spoil, tmp_path):
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        spoil(file)
    with pytest.raises(ValueError, match=r"tf_model\.h5 is not a Keras checkpoint"):
        load_checkpoint(tmp_path / "tf_model.h5")


def test_an_empty_dataset_is_named(tmp_path):
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file["convnext/a"] = h5py.Empty("float32")
    with pytest.raises(ValueError, match="convnext/a is an empty dataset"):
        load_checkpoint(tmp_path / "tf_model.h5")


def test_damaged_h5_is_refused(tmp_path):
    h5_writer(model_of(ConvNextModel).state_dict())(tmp_path / "tf_model.h5")
    content = (tmp_path / "tf_model.h5").read_bytes()
    for size in (0, 7, len(content) // 2, len(content) - 9):
        (tmp_path / "tf_model.h5").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"tf_model\.h5 is not a Keras checkpoint"):
            load_checkpoint(tmp_path / "tf_model.h5")


def test_h5py_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(ImportError, match=r"need h5py.*\[keras\]"):
        load_checkpoint(tmp_path / "tf_model.h5")
