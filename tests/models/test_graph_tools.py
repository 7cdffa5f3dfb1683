"""Tools that inspect graphs see the layers of a fused or frozen model, as before it was fused."""

from __future__ import annotations

import pytest
import torch
import transformers
from fuse_support import one_thread  # noqa: F401
from graph_views import BY_SYMBOLS, VIEWS
from other_parameters import frozen, output, plain
from support import FLOAT32_BOUND, randomise, relative_error

import convnext_fast
from convnext_fast import fuse

SIZES = {"num_stages": 2, "hidden_sizes": [16, 24], "depths": [2, 1], "num_labels": 5}
MODELS = {
    "V1": lambda: convnext_fast.ConvNext(convnext_fast.ConvNextConfig(**SIZES)),
    "V2": lambda: convnext_fast.ConvNext(convnext_fast.ConvNextV2Config(**SIZES)),
    "transformers": lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**SIZES)),
}


def fused(made):
    return fuse(randomise(made()).eval()).model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("kind", ["V1", pytest.param("V2", marks=pytest.mark.thorough), "transformers"])
def test_they_see_what_they_see_of_the_plain_model(kind, name):
    made = MODELS[kind]
    if kind == "transformers" and name in BY_SYMBOLS:
        pytest.skip("torch.fx does not trace models of transformers")
    x = torch.randn(2, 3, 64, 64)
    seen = VIEWS[name](plain(made), x)
    if name == "source_partitions" and not seen and torch.__version__ < "2.10":
        pytest.skip("this PyTorch's exported programs do not name their sources")
    assert seen
    for way in (fused, frozen):
        model = way(made)
        before = output(model, x)
        assert VIEWS[name](model, x) == seen, way.__name__
        assert torch.equal(output(model, x), before)


def test_leaves_of_a_traced_model_stay_fused():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, convnext_fast.models.layers.ConvNextBlock) or super().is_leaf_module(module, name)

    model, x = fused(MODELS["V1"]), torch.randn(2, 3, 64, 64)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert traced(x).grad_fn is not None
    assert sum(node.op == "call_module" and "blocks" in node.target for node in traced.graph.nodes) == 3
    assert relative_error(traced(x), model(x)) <= FLOAT32_BOUND
