"""`fuse` on the models of timm and torchvision."""

from __future__ import annotations

import copy
import pickle
import re
import sys

import pytest
import torch
from fuse_support import check_bfloat16, check_float32, everything, fused_calls, one_thread, widths  # noqa: F401
from support import BOUNDS, FLOAT32_BOUND, no_worse, randomise, relative_error

from convnext_fast import fuse, unfuse
from convnext_fast.backends import environment
from convnext_fast.backends.cpu import llvm

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

V2 = {"use_grn": True, "ls_init_value": None}
TIMM = {
    "plain": {},
    "conv_mlp": {"conv_mlp": True},
    "kernels": {"kernel_sizes": (3, 5, 7, 3)},
    "overlapping stem": {"stem_type": "overlap_tiered", "conv_mlp": True},
    "head norm first": {"head_norm_first": True, "act_layer": "relu"},
    "no layer scale": {"ls_init_value": None, "act_layer": "gelu_tanh"},
    "hidden head": {"head_hidden_size": 9, "norm_eps": 1e-5, "act_layer": "silu"},
    "no biases": {"conv_bias": False, "stem_type": "overlap"},
    "v2": V2,
    "v2, conv_mlp": {**V2, "conv_mlp": True},
}


def timm_model(seed=0, **options):
    usual = {"depths": (1, 2, 1, 1), "dims": widths(seed), "num_classes": 5, "drop_path_rate": 0.4}
    return randomise(timm.models.convnext.ConvNeXt(**{**usual, **options}))


def torchvision_model(seed=0, depth=1, **options):
    dims = widths(seed)
    block = torchvision.models.convnext.CNBlockConfig
    setting = [block(dim, after, depth) for dim, after in zip(dims, [*dims[1:], None], strict=True)]
    options = {"num_classes": 5, "stochastic_depth_prob": 0.4, **options}
    return randomise(torchvision.models.convnext.ConvNeXt(setting, **options))


@pytest.fixture
def image():
    return torch.randn(3, 3, 48, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TIMM)
def test_timm_agrees(name, image):
    model = timm_model(seed=list(TIMM).index(name) + 20, **TIMM[name])
    report = check_float32(copy.deepcopy(model), image)
    assert len(report.fused) == 5
    assert len(report.patch_layers) == 3 + ("overlap" not in TIMM[name].get("stem_type", ""))
    assert not report.left_alone
    check_bfloat16(model, image)


@pytest.mark.parametrize("seed", range(40, 48))
def test_torchvision_agrees(seed, image):
    model = torchvision_model(seed, stochastic_depth_prob=seed % 4 * 0.2)
    report = check_float32(copy.deepcopy(model), image)
    assert len(report.fused) == 4
    assert len(report.patch_layers) == 4
    assert not report.left_alone
    check_bfloat16(model, image)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [timm_model, torchvision_model])
def test_agrees_at_odd_sizes(make, dtype, layout):
    """Sizes that no stride divides: leftover rows and columns are ignored."""
    model = make().to(dtype).train()
    x = torch.randn(3, 3, 38, 45, dtype=dtype).contiguous(memory_format=layout)
    expected = everything(model, x)
    assert len(fuse(model, strict=True).patch_layers) == 4
    actual = everything(model, x)
    assert fused_calls(model(x), "downsample_fwd") == 3
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= BOUNDS[dtype], name


@pytest.mark.parametrize("make", [timm_model, torchvision_model])
def test_drops_the_same_samples_under_autocast(make, image):
    model = make().train()
    images = image.repeat(4, 1, 1, 1)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(model(images))
        fuse(model)
    assert relative_error(results[1], results[0]) <= 0.04
    assert relative_error(model(images), results[0]) > 0.08


@pytest.mark.parametrize("make", [timm_model, torchvision_model])
def test_copies_and_back(make, image):
    model = make().eval()
    expected = model(image)
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    blocks = len(fuse(model, strict=True).fused)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused_calls(twin(image)) == blocks
        assert relative_error(twin(image), expected) <= FLOAT32_BOUND
        unfuse(twin)
        assert [type(module) for module in twin.modules()] == kinds
        assert relative_error(twin(image), expected) <= FLOAT32_BOUND


NAMED = {
    "convnext_atto": (12, 4),
    "convnext_atto_ols": (12, 3),
    "convnext_tiny_hnf": (18, 4),
    "convnext_tiny.dinov3_lvd1689m": (18, 4),
    "convnext_base.clip_laion2b": (36, 4),
    "convnextv2_atto": (12, 4),
    "convnext_zepto_rms": (0, 0),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_timm_models(name):
    """Blocks and patch layers. On the meta device, where they have no weights."""
    with torch.device("meta"):
        report = fuse(timm.create_model(name))
    assert (len(report.fused), len(report.patch_layers)) == NAMED[name]
    if name.endswith("rms"):
        assert all("not a LayerNorm over" in reason for reason in report.left_alone.values())
    else:
        assert not report.left_alone


@pytest.mark.filterwarnings("ignore:a fused")
@pytest.mark.parametrize("frozen", [True, False])
def test_a_compiled_model_notices_a_longer_block(frozen, image):
    """torchvision's blocks call whatever their Sequential holds."""
    model = torchvision_model().eval()
    fused = fuse(model)
    compiled = torch.compile(fused.freeze() if frozen else model, backend="aot_eager")
    with torch.no_grad():
        before = compiled(image)
        model.features[1][0].block.append(torch.nn.Tanh())
        after = compiled(image)
        assert relative_error(after, before) > 1e-3
        assert relative_error(after, model(image)) <= FLOAT32_BOUND


def test_torchvision_tiny():
    with torch.device("meta"):
        report = fuse(torchvision.models.convnext_tiny(), strict=True)
    assert (len(report.fused), len(report.patch_layers)) == (18, 4)


def test_timm_features_and_checkpointing(image):
    options = {"depths": (1, 2, 1, 1), "dims": (8, 12, 9, 16), "drop_path_rate": 0.4}
    model = timm.create_model("convnext_tiny", features_only=True, out_indices=(0, 2), **options)
    randomise(model).train()
    for checkpointing in (False, True):
        for name, module in model.items():
            if name.startswith("stages"):
                module.grad_checkpointing = checkpointing
        expected = everything(model, image)
        assert fuse(model).fused
        for name, value in everything(model, image).items():
            assert relative_error(value, expected[name]) <= FLOAT32_BOUND, name
        unfuse(model)


def test_timm_methods(image):
    model = timm_model().eval()
    expected = model.forward_features(image), model.forward_intermediates(image)[1], model.get_classifier()
    fuse(model)
    assert relative_error(model.forward_features(image), expected[0]) <= FLOAT32_BOUND
    for mine, theirs in zip(model.forward_intermediates(image)[1], expected[1], strict=True):
        assert relative_error(mine, theirs) <= FLOAT32_BOUND
    model.reset_classifier(2)
    assert model(image).shape == (3, 2)


def test_torchvision_feature_extractor(image):
    """`torch.fx` traces a fused model."""
    model = torchvision_model().eval()
    nodes = {"features.1": "a", "features.7": "b"}
    extract = torchvision.models.feature_extraction.create_feature_extractor
    expected = extract(model, nodes)(image)
    fuse(model)
    for key, value in extract(model, nodes)(image).items():
        assert relative_error(value, expected[key]) <= FLOAT32_BOUND, key


LEFT_ALONE = {
    "dilated": ({"output_stride": 8}, "has dilation|is Conv2dSame, not"),
    "9×9": ({"kernel_sizes": (7, 9, 7, 7)}, r"kernel \(9, 9\)"),
    "quick gelu": ({"act_layer": "quick_gelu"}, r"\(QuickGELU\) is none of"),
    "rms norm": ({"norm_layer": "rmsnorm"}, "is RmsNorm(2d)?, not a LayerNorm"),
    "simple norm": ({"norm_layer": "simplenorm", "conv_mlp": True}, "is SimpleNorm2d, not a LayerNorm"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name, image):
    options, reason = LEFT_ALONE[name]
    model = timm_model(**options).eval()
    expected = model(image)
    report = fuse(model)
    assert report.left_alone
    assert all(re.search(reason, found) for found in report.left_alone.values())
    assert relative_error(model(image), expected) <= FLOAT32_BOUND


def test_timm_shortcut_is_left_alone():
    block = timm.models.convnext.ConvNeXtBlock(8, 8)
    block.shortcut = torch.nn.AvgPool2d(3, 1, 1)
    assert "computes something other than" in fuse(torch.nn.Sequential(block)).left_alone["0"]
    pooled = timm.models.convnext.ConvNeXtBlock(8, 16, stride=2)
    assert "maps 8 channels to 16" in fuse(torch.nn.Sequential(pooled)).left_alone["0"]


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_bench_loads_by_name(library):
    from convnext_fast.cli.bench import load_model

    with torch.device("meta"):
        assert len(fuse(load_model(f"{library}:convnext_tiny")).fused) == 18
    with pytest.raises(ValueError, match=f"{library} has no model 'convnext_huge'"):
        load_model(f"{library}:convnext_huge")


@pytest.mark.parametrize("backend", ["kernels", "aten"])
@pytest.mark.parametrize("make", [timm_model, torchvision_model])
def test_frozen_hosts_run_as_one_sequence_and_notice_changes(make, backend, monkeypatch):
    """torchvision's features; timm's stages after its stem."""
    dims, image = (16, 24, 32, 40), torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sys.modules[__name__], "widths", lambda seed: dims)
    model = make().eval()
    if backend == "aten":
        monkeypatch.setattr(environment, "REQUEST", "aten")
    runs, run = [], llvm.run
    monkeypatch.setattr(llvm, "run", lambda kernels, *rest: runs.append(len(kernels)) or run(kernels, *rest))
    report = fuse(model, strict=True).freeze()
    blocks = len(report.fused)
    assert len(report.frozen) == blocks + 4

    def check():
        plain = copy.deepcopy(model)
        unfuse(plain)
        with torch.no_grad():
            eager, got = plain(image), model(image)
            assert no_worse(got, plain.double()(image.double()), eager)
        return got

    before = check()
    if backend == "kernels" and llvm.machine_for() is not None:
        assert runs == [blocks + (4 if make is torchvision_model else 3)]
    block = model.get_submodule(report.fused[1])
    with torch.no_grad():
        next(layer for layer in block.modules() if isinstance(layer, torch.nn.Linear)).weight.neg_()
    assert relative_error(check(), before) > 1e-3
    model.train()
    assert report.frozen == ()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_timm_features():
    model = timm.create_model("convnext_tiny", features_only=True, depths=(1, 2, 1, 1), dims=(16, 24, 32, 40))
    randomise(model).eval()
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(x)
        fuse(model).freeze()
        for mine, theirs in zip(model(x), expected, strict=True):
            assert relative_error(mine, theirs) <= FLOAT32_BOUND
