"""Tools that inspect graphs see the layers of fused hosts of timm and torchvision, inside their blocks too."""

from __future__ import annotations

import pytest
import torch
from fuse_support import one_thread, tensors  # noqa: F401
from graph_views import VIEWS
from other_parameters import frozen
from small_hosts import MODELS
from support import FLOAT32_BOUND, randomise, relative_error

from convnext_fast import fuse

models = pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
IMAGE = torch.randn(2, 3, 64, 64)


def unfused(made):
    return randomise(made()).eval()


def fused(made):
    return fuse(unfused(made)).model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", VIEWS)
@models
def test_they_see_what_they_see_of_the_unfused_model(made, name):
    seen = VIEWS[name](unfused(made), IMAGE)
    assert seen
    for kind in (fused, frozen):
        assert VIEWS[name](kind(made), IMAGE) == seen, kind.__name__


@models
def test_features_inside_a_block(made):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    names = extraction.get_graph_node_names(unfused(made))[1]
    inside = [name for name in names if name.endswith(("mlp.fc1", "block.3"))]
    assert inside
    expected = extraction.create_feature_extractor(unfused(made), inside)(IMAGE)
    for kind in (fused, frozen):
        assert extraction.get_graph_node_names(kind(made))[1] == names
        for name, value in extraction.create_feature_extractor(kind(made), inside)(IMAGE).items():
            assert relative_error(value, expected[name]) <= FLOAT32_BOUND, name


def test_feature_graph_of_timm():
    graphs = pytest.importorskip("timm.models._features_fx")
    models = [graphs.GraphExtractNet(kind(MODELS["timm"]), ["stages.0.blocks.1.mlp.fc1"]) for kind in (unfused, fused)]
    assert relative_error(*(tensors(model(IMAGE))[0] for model in models)) <= FLOAT32_BOUND
