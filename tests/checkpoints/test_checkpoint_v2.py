"""Checkpoints of ConvNeXt V2: names and shapes in every format, and those of its sparse pre-training."""

from __future__ import annotations

import pytest
import torch
from support import randomise

from convnext_fast import VARIANTS, ConvNext, ConvNextConfig, ConvNextV2Config, ConvNextV2ForImageClassification
from convnext_fast.checkpoints.config_json import config_fields
from convnext_fast.checkpoints.formats import from_timm, infer_config, recognise, to_timm
from convnext_fast.checkpoints.load_save import load_checkpoint, load_model, save_model
from convnext_fast.cli.convert import convert_checkpoint

CONFIG = ConvNextV2Config(hidden_sizes=[4, 6], depths=[1, 2], num_stages=2, num_labels=3, layer_norm_eps=1e-6)
NAMES = {
    "timm": ("stages.1.blocks.1.mlp.grn.weight", "stages.1.blocks.1.mlp.grn.bias", (24,)),
    "transformers": (
        "convnextv2.encoder.stages.1.layers.1.grn.weight",
        "convnextv2.encoder.stages.1.layers.1.grn.bias",
        (1, 1, 1, 24),
    ),
    "official": ("stages.1.1.grn.gamma", "stages.1.1.grn.beta", (1, 1, 1, 24)),
}


def state():
    return dict(randomise(ConvNext(CONFIG)).state_dict())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in one.items())


@pytest.mark.parametrize("format", NAMES)
def test_names_and_shapes(format):
    ours = state()
    theirs = from_timm(ours, format)
    weight, bias, shape = NAMES[format]
    assert theirs[weight].shape == theirs[bias].shape == shape
    assert torch.equal(theirs[weight].flatten(), ours[NAMES["timm"][0]])
    assert recognise(theirs) == format
    named, others = to_timm(theirs, format)
    assert same(named, ours)
    assert not others
    assert infer_config(named, format).amended(layer_norm_eps=1e-6) == CONFIG


@pytest.mark.parametrize(("kind", "name"), [(ConvNextConfig, "convnext_tiny"), (ConvNextV2Config, "convnextv2_huge")])
def test_timm_is_told_the_version(kind, name):
    """Of the sizes of v2_huge, which V1 has under no name."""
    depths, widths = VARIANTS["v2_huge"]
    options = {"global_pool": "avg", "head_norm_first": False}
    fields = config_fields(kind(depths=depths, hidden_sizes=widths), "timm", [], "float32", options)
    assert fields["architecture"] == name
    assert fields["model_args"].get("use_grn", False) == (kind is ConvNextV2Config)


def test_torchvision_has_none():
    with pytest.raises(ValueError, match="it is a ConvNeXt V2, which torchvision does not have"):
        from_timm(state(), "torchvision")


@pytest.mark.parametrize("format", NAMES)
def test_folders_and_files(format, tmp_path):
    model = randomise(ConvNext(CONFIG))
    save_model(model, tmp_path / "folder", format=format)
    convert_checkpoint(tmp_path / "folder", tmp_path / "file.pth", format)
    for source in (tmp_path / "folder", tmp_path / "file.pth"):
        assert same(load_model(ConvNext, source).state_dict(), model.state_dict())
        other = load_model(ConvNextV2ForImageClassification, source)
        assert same(dict(from_timm(model.state_dict(), "transformers")), dict(other.state_dict()))


def sparse(dense):
    """A dense state dict of the official repository as its sparse pre-training saves it, with a decoder."""
    kept = {"mask_token": torch.ones(1, 6, 1, 1), "proj.weight": torch.ones(6, 6, 1, 1), "pred.bias": torch.ones(3)}
    kept["decoder.0.dwconv.weight"] = torch.ones(6, 1, 7, 7)
    for key, tensor in dense.items():
        layer, _, name = key.rpartition(".")
        if layer.startswith(("head", "norm")):
            continue
        if not layer.startswith("downsample_layers.0"):
            if tensor.dim() == 4 and name == "weight":  # (C', C, H, W) to (W·H, C, C')
                taps = tensor.permute(3, 2, 1, 0).flatten(0, 1)
                kept[f"encoder.{layer}.kernel"] = taps[:, 0] if layer.endswith("dwconv") else taps
                continue
            if name in ("gamma", "beta"):
                tensor = tensor.reshape(1, -1)
            elif layer.endswith(("dwconv", "downsample_layers.1.1")):
                tensor = tensor[None]
            else:
                layer += ".linear" if "pwconv" in layer else ".ln"
        kept[f"encoder.{layer}.{name}"] = tensor
    return kept


def test_sparse_pre_training(tmp_path):
    ours = state()
    torch.save({"model": sparse(from_timm(ours, "official"))}, tmp_path / "fcmae.pth")
    loaded = load_checkpoint(tmp_path / "fcmae.pth")
    encoder = {k: t for k, t in ours.items() if not k.startswith("head.")}
    assert same(loaded.state_dict, encoder)
    assert (loaded.format, loaded.config.version, loaded.config.num_labels) == ("official", 2, 0)
    with pytest.warns(UserWarning, match=r"newly initialises head\.norm"):
        model = load_model(ConvNext, tmp_path / "fcmae.pth")
    assert all(torch.equal(t, encoder[k]) for k, t in model.state_dict().items() if k in encoder)


def test_damaged_sparse_kernels_are_named(tmp_path):
    damaged = sparse(from_timm(state(), "official"))
    damaged["encoder.stages.0.0.dwconv.kernel"] = torch.ones(48, 4)
    torch.save(damaged, tmp_path / "fcmae.pth")
    with pytest.raises(ValueError, match=r"dwconv|conv_dw"):
        load_model(ConvNext, tmp_path / "fcmae.pth")
