"""Checkpoints against timm and torchvision themselves: strict loading both ways, and the same logits."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from support import FLOAT32_BOUND, randomise, relative_error

timm = pytest.importorskip("timm", reason="timm is not installed: stage 4 of .ci/run runs these")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed: stage 4 of .ci/run runs these")

from convnext_fast import ConvNext, ConvNextConfig, ConvNextForImageClassification  # noqa: E402
from convnext_fast.checkpoints.formats import FORMATS, from_timm, recognise, to_timm  # noqa: E402
from convnext_fast.checkpoints.load_save import load_checkpoint, load_model, save_model  # noqa: E402
from convnext_fast.cli.convert import convert_checkpoint  # noqa: E402

SIZES = {"depths": (1, 2, 1, 1), "dims": (8, 12, 20, 24), "num_classes": 6}
# Of timm's names: linear layers as convolutions (atto, pico), as linear layers (tiny), norm before pooling (tiny_hnf).
TIMM = {
    "convnext_atto": {},
    "convnext_femto": {"in_chans": 1, "num_classes": 0},
    "convnext_pico": {"ls_init_value": None},
    "convnext_tiny": {"patch_size": 5},
    "convnext_small": {"global_pool": "max", "act_layer": "gelu_tanh"},
    "convnext_tiny_hnf": {},
    "convnext_xxlarge": {},
}
IMAGE = torch.randn(2, 3, 65, 90, generator=torch.Generator().manual_seed(0))


def timm_model(name, **more):
    return randomise(timm.create_model(name, **{**SIZES, **TIMM[name], **more}), 1).eval()


def torchvision_model(seed=1):
    setting = torchvision.models.convnext.CNBlockConfig
    blocks = [setting(8, 12, 1), setting(12, 20, 2), setting(20, 24, 1), setting(24, None, 1)]
    return randomise(torchvision.models.ConvNeXt(blocks, num_classes=6), seed).eval()


@torch.no_grad()
def assert_same_outputs(ours, theirs):
    channels = next(theirs.parameters()).shape[1]
    actual, expected = ours(IMAGE[:, :channels]), theirs(IMAGE[:, :channels])
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= FLOAT32_BOUND


def options_of(name):
    """The options that a bare timm file does not contain."""
    return {"global_pool": "max"} if name == "convnext_small" else {}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("fused", [True, False])
def test_timm_weights_load_strictly(name, fused, tmp_path):
    theirs = timm_model(name)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    config = load_checkpoint(tmp_path / "timm.pth").config
    if name == "convnext_small":
        config = ConvNextConfig.from_dict(config.to_dict() | {"hidden_act": "gelu_new"})
    if name == "convnext_xxlarge":  # these are not its sizes, so the epsilon cannot be inferred
        config = ConvNextConfig.from_dict(config.to_dict() | {"norm_eps": 1e-5, "layer_norm_eps": 1e-5})
    ours = load_model(ConvNext, tmp_path / "timm.pth", config=config, fused=fused, **options_of(name))
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("name", TIMM)
def test_folders_pushed_by_timm(name, tmp_path):
    theirs = timm_model(name)
    timm.models.save_for_hf(theirs, tmp_path, model_config={"label_names": list("abcdef")}, safe_serialization=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architecture"] == name
    ours = load_model(ConvNext, tmp_path)
    assert ours.config.norm_eps == ours.config.layer_norm_eps == theirs.stem[1].eps
    if theirs.num_classes:
        assert list(ours.config.id2label.values()) == list("abcdef")
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("name", TIMM)
def test_our_folders_load_in_timm(name, tmp_path):
    theirs = timm_model(name)
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=True)
    save_model(load_model(ConvNext, tmp_path / "theirs"), tmp_path / "ours")
    again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    assert_same_outputs(again, theirs)
    assert again.stem[1].eps == theirs.stem[1].eps
    state = theirs.state_dict()
    assert all(torch.equal(t.flatten(), state[k].flatten()) for k, t in again.state_dict().items())


@pytest.mark.parametrize("name", TIMM)
def test_our_state_dicts_load_strictly_in_timm(name):
    state = timm_model(name).state_dict()
    written = from_timm(to_timm(state, "timm")[0], "timm")
    written = {k: t.view_as(state[k]) for k, t in written.items()}  # linear layers may be 1×1 convolutions
    timm_model(name).load_state_dict(written, strict=True)
    assert all(torch.equal(written[k], t) for k, t in state.items())


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_tiny", "convnext_tiny_hnf"])
def test_features_only(name, tmp_path):
    whole = timm_model(name)
    theirs = timm_model(name, features_only=True)
    assert recognise(theirs.state_dict()) == "timm"
    torch.save(theirs.state_dict(), tmp_path / "features.pth")
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    assert_same_outputs(load_model(ConvNext, tmp_path / "features.pth", features_only=True), theirs)
    stages = {k: v for k, v in whole.state_dict().items() if k.startswith("st")}
    theirs.load_state_dict({k.replace("stem.", "stem_").replace("stages.", "stages_"): v for k, v in stages.items()})
    assert_same_outputs(load_model(ConvNext, tmp_path / "whole.pth", features_only=True), theirs)


def test_timm_training_checkpoint(tmp_path):
    model, averaged = timm_model("convnext_tiny"), timm_model("convnext_tiny")
    randomise(averaged, 9)
    saver = timm.utils.CheckpointSaver(
        torch.nn.DataParallel(model),
        torch.optim.AdamW(model.parameters()),
        model_ema=timm.utils.ModelEmaV3(averaged),
        args=argparse.Namespace(model="convnext_tiny"),
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=0.5)
    for use_ema, expected in ((False, model), (True, averaged)):
        ours = load_model(ConvNext, tmp_path / "last.pth.tar", use_ema=use_ema)
        assert all(torch.equal(t, expected.state_dict()[k]) for k, t in ours.state_dict().items())


def save_shapes(model, path):
    """A state dict of the model's keys and shapes, of zeros in 16 bits: the largest file takes 0.4 GB."""
    torch.save({k: torch.zeros(t.shape, dtype=torch.float16) for k, t in model.state_dict().items()}, path)


@pytest.mark.parametrize("name", ["convnext_atto_ols", "convnext_atto_rms", "convnext_large_mlp"])
def test_timm_models_of_other_architectures(name, tmp_path):
    save_shapes(timm.create_model(name, device="meta"), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"stem\.1|missing: .*norm\.bias|head\.pre_logits"):
        load_model(ConvNext, tmp_path / "x.pth")


def test_timm_reads_and_writes_v2(tmp_path):
    """Its 1×1 convolutions become linear layers, and it reads ours and the official names."""
    fields = {"depths": (1, 1, 1, 1), "dims": (8, 12, 9, 16), "num_classes": 5}
    theirs = randomise(timm.create_model("convnextv2_atto", **fields)).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = load_model(ConvNext, tmp_path / "timm.pth")
    assert ours.config.version == 2
    assert_same_outputs(ours, theirs)
    save_model(ours, tmp_path / "folder")
    assert_same_outputs(timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval(), theirs)
    convert_checkpoint(tmp_path / "folder", tmp_path / "official.pth", "official")
    again = timm.create_model("convnextv2_atto", **fields).eval()
    filtered = timm.models.convnext.checkpoint_filter_fn(torch.load(tmp_path / "official.pth"), again)
    again.load_state_dict(filtered, strict=True)
    assert_same_outputs(again, theirs)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "inception_next_tiny", "edgenext_small"])
def test_timm_models_of_other_families(name, tmp_path):
    with torch.device("meta"):
        model = timm.create_model(name)
    save_shapes(model, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"not the keys of a ConvNeXt|unexpected"):
        load_model(ConvNext, tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["efficientnet_b0", "swin_t", "mobilenet_v3_small", "vgg11", "densenet121"])
def test_torchvision_models_of_other_families(name, tmp_path):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    save_shapes(model, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not the keys of a ConvNeXt"):
        load_model(ConvNext, tmp_path / "x.pth")


def test_torchvision_weights_load_strictly_both_ways(tmp_path):
    theirs = torchvision_model()
    torch.save(theirs.state_dict(), tmp_path / "torchvision.pth")
    ours = load_model(ConvNext, tmp_path / "torchvision.pth")
    assert_same_outputs(ours, theirs)
    save_model(ours, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "again.pth", "torchvision")
    again = torchvision_model(seed=5)
    again.load_state_dict(torch.load(tmp_path / "again.pth"), strict=True)
    assert all(torch.equal(t, theirs.state_dict()[k]) for k, t in again.state_dict().items())


def test_one_set_of_weights_through_all_libraries(tmp_path):
    theirs = torchvision_model()
    torch.save(theirs.state_dict(), tmp_path / "0.pth")
    source = tmp_path / "0.pth"
    for i, format in enumerate([*FORMATS, "official", "torchvision"], 1):
        convert_checkpoint(source, tmp_path / f"{i}.pth", format)
        source = tmp_path / f"{i}.pth"
    last = torch.load(source)
    assert last.keys() == theirs.state_dict().keys()
    assert all(torch.equal(t, theirs.state_dict()[k]) for k, t in last.items())
    convert_checkpoint(source, tmp_path / "folder", "transformers")
    with torch.no_grad():
        logits = load_model(ConvNextForImageClassification, tmp_path / "folder")(IMAGE).logits
        assert relative_error(logits, theirs(IMAGE)) <= FLOAT32_BOUND
        convert_checkpoint(source, tmp_path / "official.pth", "official")
        # timm reads the official repository's files with its own map of names.
        peer = timm_model("convnext_tiny", patch_size=4)
        filtered = timm.models.convnext.checkpoint_filter_fn(torch.load(tmp_path / "official.pth"), peer)
        peer.load_state_dict(filtered, strict=True)
        assert relative_error(peer(IMAGE), theirs(IMAGE)) <= FLOAT32_BOUND
