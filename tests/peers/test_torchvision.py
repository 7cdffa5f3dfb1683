"""`ConvNext` against torchvision's ConvNeXt, by way of the checkpoint formats: the same logits and gradients."""

from __future__ import annotations

import pytest
import torch
from support import BOUNDS, gradients, randomise, relative_error

from convnext_fast import ConvNext, ConvNextConfig
from convnext_fast.checkpoints.formats import to_timm

convnext = pytest.importorskip("torchvision.models.convnext")


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, True), (torch.float64, False)])
@pytest.mark.parametrize(
    ("widths", "depths", "size"),
    [((11, 24, 30, 52), (1, 2, 1, 1), (45, 70)), ((8, 9, 33), (2, 1, 1), (37, 32)), ((16, 16), (1, 2), (33, 64))],
)
def test_logits_and_gradients(widths, depths, size, dtype, fused):
    setting = [
        convnext.CNBlockConfig(width, after, depth)
        for width, after, depth in zip(widths, [*widths[1:], None], depths, strict=True)
    ]
    theirs = randomise(convnext.ConvNeXt(setting, num_classes=6)).to(dtype).train()
    config = ConvNextConfig(
        num_stages=len(widths), hidden_sizes=widths, depths=depths, num_labels=6, layer_norm_eps=1e-6
    )
    ours = ConvNext(config, fused=fused, dtype=dtype).train()
    ours.load_state_dict(to_timm(theirs.state_dict(), "torchvision")[0], strict=True)
    x = torch.randn(2, 3, *size, dtype=dtype)
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        grads = gradients(model, [y], [leaf])
        if model is theirs:
            grads = {"input 0": grads.pop("input 0"), **to_timm(grads, "torchvision")[0]}
        results.append({"logits": y, **grads})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert relative_error(results[1][key], value.reshape(results[1][key].shape)) <= BOUNDS[dtype], key
