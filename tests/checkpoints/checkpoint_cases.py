"""What the checkpoint tests share: small models, and equality to the bit."""

from __future__ import annotations

import torch
from support import randomise

from convnext_fast import ConvNext, ConvNextConfig

FIELDS = {"hidden_sizes": [6, 9, 12, 15], "depths": [1, 2, 1, 1]}


def model_of(cls=ConvNext, seed=0, **options):
    fields = {**FIELDS, "num_labels": 5, "layer_norm_eps": 1e-6, **options.pop("fields", {})}
    return randomise(cls(getattr(cls, "config_class", ConvNextConfig)(**fields), **options), seed).eval()


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def image(config, batch=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, config.num_channels, 45, 70, generator=generator)
