"""Checkpoints in models of another kind than they were saved from, and how the parameters come out."""

from __future__ import annotations

import os

import pytest
import torch
from checkpoint_cases import FIELDS, image, model_of, same
from support import FLOAT32_BOUND, relative_error

from convnext_fast import ConvNext, ConvNextBackbone, ConvNextConfig, ConvNextForImageClassification, ConvNextModel
from convnext_fast.checkpoints.load_save import load_model, save_model
from convnext_fast.cli.convert import convert_checkpoint

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


# Models of other kinds than the checkpoint's


def test_bare_model_from_a_classifier(tmp_path):
    source = model_of(ConvNextForImageClassification)
    save_model(source, tmp_path)
    assert same(load_model(ConvNextModel, tmp_path).state_dict(), source.convnext.state_dict())
    assert load_model(ConvNext, tmp_path, num_classes=0).get_classifier().state_dict() == {}


@pytest.mark.parametrize(("cls", "classifier"), [(ConvNextForImageClassification, "classifier"), (ConvNext, "head.fc")])
def test_classifier_from_a_bare_model(cls, classifier, tmp_path):
    source = model_of(ConvNextModel)
    save_model(source, tmp_path)
    with pytest.warns(UserWarning, match=rf"newly initialises {classifier}\.weight, {classifier}\.bias"):
        model = load_model(cls, tmp_path, num_labels=400)
    layer = model.get_submodule(classifier)
    assert layer.weight.shape == (400, 15)
    assert abs(layer.weight.std().item() - 0.02) < 0.002
    assert not layer.bias.any()
    base = ConvNextModel.from_pretrained(tmp_path)
    assert all(base.state_dict()[k].sum() == t.sum() for k, t in source.state_dict().items())


def test_backbone_from_a_classifier(tmp_path):
    source = model_of(ConvNextForImageClassification, fields={"out_features": ["stage2", "stage4"]})
    save_model(source, tmp_path)
    with pytest.warns(UserWarning, match=r"hidden_states_norms\.stage2\.weight.*classifier\.weight.*not used"):
        model = load_model(ConvNextBackbone, tmp_path)
    norm = model.hidden_states_norms["stage4"]
    assert torch.equal(norm.weight, torch.ones(15))
    assert not norm.bias.any()
    with torch.no_grad():
        x = image(source.config)
        expected = source(x, output_hidden_states=True).hidden_states[2]
        actual = model(x).feature_maps[0]
    expected = torch.nn.functional.layer_norm(expected.permute(0, 2, 3, 1), (9,), eps=1e-6).permute(0, 3, 1, 2)
    assert relative_error(actual, expected) <= FLOAT32_BOUND


def test_from_a_backbone(tmp_path):
    source = model_of(ConvNextBackbone, fields={"out_features": ["stem", "stage4"]})
    save_model(source, tmp_path)
    assert same(load_model(ConvNextBackbone, tmp_path).state_dict(), source.state_dict())
    features = load_model(ConvNext, tmp_path, features_only=True)
    assert torch.equal(features.stem[0].weight, source.embeddings.patch_embeddings.weight)
    with pytest.warns(UserWarning, match=r"newly initialises layernorm\.weight, layernorm\.bias, .*not used"):
        model = load_model(ConvNextModel, tmp_path)
    assert torch.equal(model.layernorm.weight, torch.ones(15))
    with pytest.raises(ValueError, match=r"no name for hidden_states_norms\.stage4"):
        convert_checkpoint(tmp_path, tmp_path / "timm", "timm")
    convert_checkpoint(tmp_path, tmp_path / "again", "transformers")
    assert same(load_model(ConvNextBackbone, tmp_path / "again").state_dict(), source.state_dict())
    config = ConvNextConfig.from_pretrained(tmp_path, out_features=["stem", "stage1"])
    with pytest.warns(UserWarning, match=r"newly initialises hidden_states_norms\.stage1\.weight"):
        other = load_model(ConvNextBackbone, tmp_path, config=config)
    assert torch.equal(other.hidden_states_norms["stem"].weight, source.hidden_states_norms["stem"].weight)


def test_features_only(tmp_path):
    source = model_of()
    save_model(source, tmp_path / "full")
    features = load_model(ConvNext, tmp_path / "full", features_only=True, out_indices=[0, 2])
    flat = {k.replace("stages.", "stages_").replace("stem.", "stem_"): v for k, v in features.state_dict().items()}
    torch.save(flat, tmp_path / "flat.pth")
    again = load_model(ConvNext, tmp_path / "flat.pth", features_only=True, out_indices=[0, 2])
    x = image(source.config)
    with torch.no_grad():
        expected = source.forward_intermediates(x, [0, 2], intermediates_only=True)
        for maps in (features(x), again(x)):
            assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    convert_checkpoint(tmp_path / "flat.pth", tmp_path / "official.pth", "official")
    assert "norm.weight" not in torch.load(tmp_path / "official.pth")["model"]


def test_another_number_of_classes(tmp_path):
    source = model_of(ConvNextForImageClassification)
    save_model(source, tmp_path)
    with pytest.raises(ValueError, match=r"2 of a wrong shape: classifier.weight \(5, 15\), expected \(300, 15\)") as e:
        load_model(ConvNextForImageClassification, tmp_path, num_labels=300)
    assert "ignore_mismatched_sizes=True" in str(e.value)
    with pytest.warns(UserWarning, match=r"another size.*classifier.weight \(5, 15\), expected \(300, 15\)"):
        model = load_model(ConvNextForImageClassification, tmp_path, num_labels=300, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 300
    assert abs(model.classifier.weight.std().item() - 0.02) < 0.002
    assert not model.classifier.bias.any()
    assert same(model.convnext.state_dict(), source.convnext.state_dict())
    same_size = load_model(ConvNextForImageClassification, tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert same(same_size.state_dict(), source.state_dict())


@pytest.mark.parametrize("cls", [ConvNext, ConvNextForImageClassification])
def test_layers_of_another_size(cls, tmp_path):
    source = model_of(cls)
    save_model(source, tmp_path)
    config = ConvNextConfig(**{**FIELDS, "hidden_sizes": [6, 9, 12, 16], "num_channels": 1}, num_labels=5)
    with pytest.raises(ValueError, match=r"\(15, 12, 2, 2\), expected \(16, 12, 2, 2\)"):
        load_model(cls, tmp_path, config=config)
    with pytest.warns(UserWarning, match=r"\(15, 12, 2, 2\), expected \(16, 12, 2, 2\)"):
        model, info = load_model(
            cls, tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
        )
    state, resized = model.state_dict(), {name for name, *_ in info["mismatched_keys"]}
    for name, tensor in source.state_dict().items():
        assert (tensor.shape != state[name].shape) == (name in resized), name
        if name not in resized:
            assert torch.equal(state[name], tensor), name
        elif name.endswith(("gamma", "layer_scale_parameter")):
            assert torch.all(state[name] == config.layer_scale_init_value), name
        elif name.endswith("bias") or tensor.dim() == 1:
            assert torch.all(state[name] == float(name.endswith("weight"))), name
        else:
            assert 0.01 < state[name].std() < 0.03, name
    assert len(resized) == 15


# How parameters come out


def test_dtype_and_device(tmp_path):
    save_model(model_of().half(), tmp_path)
    assert {p.dtype for p in load_model(ConvNext, tmp_path).parameters()} == {torch.float16}
    wide = load_model(ConvNext, tmp_path, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    with pytest.warns(UserWarning, match="newly initialises what has another size"):
        mixed = load_model(ConvNext, tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert mixed.head.fc.weight.dtype == torch.float16
    state = model_of().half().state_dict()
    state["head.fc.weight"] = state["head.fc.weight"].float()
    torch.save(state, tmp_path / "mixed.pth")
    assert {p.dtype for p in load_model(ConvNext, tmp_path / "mixed.pth").parameters()} == {torch.float32}
    state["head.fc.weight"] = state["head.fc.weight"].to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match=r"mixes torch\..*pass dtype="):
        load_model(ConvNext, tmp_path / "mixed.pth")


def test_loading_draws_no_random_numbers_and_parameters_train(tmp_path):
    save_model(model_of(), tmp_path)
    before = torch.get_rng_state()
    model = load_model(ConvNext, tmp_path).train()
    assert torch.equal(torch.get_rng_state(), before)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image(model.config)).square().sum().backward()
    optimiser.step()
    model.save_pretrained(tmp_path)
    again = load_model(ConvNext, tmp_path)
    assert same(again.state_dict(), model.state_dict())
    assert not same(again.state_dict(), model_of().state_dict())


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_loaded_model_does_not_depend_on_its_file(name, tmp_path):
    model = model_of()
    save_model(model, tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / name, "timm")
    again = load_model(ConvNext, tmp_path / name)
    (tmp_path / name).write_bytes(b"\0" * (tmp_path / name).stat().st_size)
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["folder", "a.pth"])
def test_any_memory_layout_is_written(name, tmp_path):
    model = model_of().to(memory_format=torch.channels_last)
    model.head.norm.bias = model.stages[3].blocks[0].norm.bias  # one tensor in two places
    model.freeze()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    save_model(model, tmp_path / "folder")
    convert_checkpoint(tmp_path / "folder", tmp_path / name, "timm")
    assert same(load_model(ConvNext, tmp_path / name).state_dict(), expected)
    assert os.path.getsize(tmp_path / "folder" / "model.safetensors") < 1.5 * sum(t.nbytes for t in expected.values())
