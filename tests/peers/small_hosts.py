"""Small models of timm and torchvision, by name."""

from __future__ import annotations

import pytest

SIZES = {"depths": (2, 1, 1, 1), "dims": (16, 24, 32, 40), "num_classes": 5}


def of_timm(**options):
    timm = pytest.importorskip("timm")
    return timm.models.convnext.ConvNeXt(**SIZES, **options)


def of_torchvision():
    convnext = pytest.importorskip("torchvision.models.convnext")
    return convnext.ConvNeXt([convnext.CNBlockConfig(16, 24, 2), convnext.CNBlockConfig(24, None, 1)], num_classes=5)


MODELS = {
    "timm": of_timm,
    "timm, conv_mlp": lambda: of_timm(conv_mlp=True),
    "timm, V2": lambda: of_timm(use_grn=True, ls_init_value=None),
    "torchvision": of_torchvision,
}
