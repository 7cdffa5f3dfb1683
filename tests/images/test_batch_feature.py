"""The image processor's output: a dictionary with attributes, and its tensors moved and cast."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import PIL.Image
import pytest
import torch

from convnext_fast.images.batch_feature import BatchFeature
from convnext_fast.images.processor import ConvNextImageProcessor


def photo():
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def test_batch_feature():
    batch = ConvNextImageProcessor(size=16)(photo(), return_tensors="pt")
    assert isinstance(batch, dict)
    assert batch.pixel_values is batch["pixel_values"]
    assert list({**batch}) == ["pixel_values"]
    for twin in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch)):
        assert type(twin) is BatchFeature
        assert torch.equal(twin.pixel_values, batch.pixel_values)
    with pytest.raises(AttributeError, match=r"'labels'.*pixel_values"):
        _ = batch.labels
    for call in (lambda: batch.to(torch.float16), lambda: batch.to("cpu", dtype=torch.bfloat16)):
        assert call() is batch
    assert batch.pixel_values.dtype == torch.bfloat16
    assert batch.to("meta").pixel_values.device.type == "meta"


def test_batch_feature_casts_only_floats():
    labels = torch.tensor([2049])
    batch = BatchFeature(pixel_values=[torch.ones(2), torch.ones(3)], labels=labels, names=["a"])
    batch.to(torch.device("cpu"), torch.float16)
    assert [value.dtype for value in batch.pixel_values] == [torch.float16] * 2
    assert batch.labels.dtype == torch.int64
    assert batch.labels.item() == 2049
    assert batch.names == ["a"]
    with pytest.raises(TypeError, match="no torch tensor"):
        ConvNextImageProcessor(size=16)(photo(), return_tensors="np").to("cpu")
    with pytest.raises(TypeError, match="cannot move"):
        batch.to(1.5)
