"""`ConvNext` against timm's ConvNeXt: one state dict, the same outputs, methods and gradients."""

from __future__ import annotations

import pytest
import torch
from support import BOUNDS, gradients, randomise, relative_error

from convnext_fast import VARIANTS, ConvNext, ConvNextConfig, ConvNextV2Config

timm = pytest.importorskip("timm")

CASES = {
    "plain": {"dims": (11, 24, 30, 52), "depths": (1, 2, 1, 1)},
    "conv_mlp": {"dims": (8, 17, 9, 33), "depths": (1, 1, 2, 1), "conv_mlp": True},
    "head_norm_first": {"dims": (16, 20, 24, 28), "depths": (1, 1, 1, 1), "head_norm_first": True},
    "no layer scale, patch 3": {"dims": (7, 9, 13, 40), "depths": (1, 0, 1, 2), "patch_size": 3},
    "relu, grey": {"dims": (19, 8, 8, 21), "depths": (1, 1, 1, 1), "act_layer": "relu", "in_chans": 1},
    "v2": {"dims": (8, 17, 12, 33), "depths": (1, 1, 2, 1), "use_grn": True},
    "v2, conv_mlp": {"dims": (11, 8, 9, 16), "depths": (1, 2, 1, 1), "use_grn": True, "conv_mlp": True},
    "max pooling": {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "global_pool": "max"},
}


def pair(name, dtype, fused, **more):
    """timm's model and ours, with the same random weights."""
    layer_scale = None if name.startswith(("no layer scale", "v2")) else 1.0
    fields = {"num_classes": 6, "ls_init_value": layer_scale, **CASES[name]}
    theirs = randomise(timm.models.convnext.ConvNeXt(**fields, **more)).to(dtype)
    config = (ConvNextV2Config if "use_grn" in fields else ConvNextConfig)(
        hidden_sizes=fields["dims"],
        depths=fields["depths"],
        patch_size=fields.get("patch_size", 4),
        num_channels=fields.get("in_chans", 3),
        hidden_act=fields.get("act_layer", "gelu"),
        layer_scale_init_value=fields["ls_init_value"] or 0.0,
        layer_norm_eps=1e-6,
        num_labels=6,
        drop_path_rate=more.get("drop_path_rate", 0.0),
    )
    ours = ConvNext(
        config,
        fused=fused,
        dtype=dtype,
        head_norm_first=fields.get("head_norm_first", False),
        global_pool=fields.get("global_pool", "avg"),
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, True), (torch.float64, False)])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name, dtype, fused):
    theirs, ours = pair(name, dtype, fused, drop_path_rate=0.3)
    torch.manual_seed(0)
    x = torch.randn(3, ours.config.num_channels, 45, 70, dtype=dtype)
    results = []
    for model in (theirs.train(), ours.train()):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(7)
        y = model(leaf)
        grads = {k: v.flatten() for k, v in gradients(model, [y], [leaf]).items()}
        results.append({"logits": y, **grads})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert relative_error(results[1][key], value) <= BOUNDS[dtype], key


@pytest.mark.parametrize("name", ["plain", "head_norm_first"])
def test_methods(name):
    theirs, ours = pair(name, torch.float64, True)
    theirs.eval(), ours.eval()
    x = torch.randn(2, 3, 64, 40, dtype=torch.float64)
    with torch.no_grad():
        a, b = theirs.forward_features(x), ours.forward_features(x)
        assert relative_error(b, a) <= BOUNDS[torch.float64]
        assert relative_error(ours.forward_head(a, pre_logits=True), theirs.forward_head(a, pre_logits=True)) <= 1e-10
        for options in ({}, {"indices": 2, "norm": True}, {"indices": [0, 2], "stop_early": True}):
            last, maps = theirs.forward_intermediates(x, **options)
            our_last, our_maps = ours.forward_intermediates(x, **options)
            pairs = zip([our_last, *our_maps], [last, *maps], strict=True)
            assert max(relative_error(mine, other) for mine, other in pairs) <= BOUNDS[torch.float64]
        for model in (theirs, ours):
            model.reset_classifier(0)
        assert relative_error(ours(x), theirs(x)) <= BOUNDS[torch.float64]
    assert ours.feature_info == theirs.feature_info
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.group_matcher(coarse=True) == theirs.group_matcher(coarse=True)
    assert ours.num_features == theirs.num_features


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_timms_keys_shapes_and_epsilons(variant):
    with torch.device("meta"):
        theirs = timm.create_model(f"convnext_{variant}".replace("_v2_", "v2_"))
    ours = ConvNext(variant, device="meta")
    squeezed = {
        k: tuple(v.flatten(1).shape if "mlp" in k and v.dim() == 4 else v.shape) for k, v in theirs.state_dict().items()
    }
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == squeezed
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and hasattr(ours.get_submodule(name), "eps"):
            assert ours.get_submodule(name).eps == module.eps, name
