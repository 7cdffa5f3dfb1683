"""Frozen runs and training steps as CUDA graphs, on a GPU that does nothing: what they launch, not what it computes."""

import json

import hollow_support
import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    script = hollow_support.HERE / "graphs_counted.py"
    return json.loads(hollow_support.run(tmp_path_factory.mktemp("hollow"), script).splitlines()[-1])


COPIES = 2  # of the image and of the result


def test_the_third_call_is_captured_and_replayed(found):
    head = found["head"][0]
    assert [graphs for _, graphs in found["calls"]] == [0, 0, 1, 1]
    assert found["calls"][-1] == [head + COPIES, 1]
    assert found["maps"] == found["ends"] == [0, 0, 1, 1]
    assert found["inference_mode"] == [1]
    assert found["threads"] == 80


def test_outputs_are_tensors_of_their_own(found):
    assert found["memories"] == 3
    assert found["format"]


def test_gradients_hooks_and_captures_use_the_plan(found):
    assert found["a gradient"] == [1, 0]
    assert found["launch hooks"] == [0]
    assert found["a capture"] == [True, 0]
    assert found["after it"] == [1]


def test_the_least_recently_used_of_eight_shapes_goes(found):
    assert found["eight shapes"] == [1] * 8
    assert found["the ninth"] == [0, 0, 1]
    assert found["the first, used since"] == [1]
    assert found["the second"] == [0, 0, 1]


def test_changed_weights_are_captured_anew(found):
    assert found["before changes"] == [0, 0, 1]
    assert found["a weight in place"] == [0, 0, 1]
    assert found["the stem in place"] == [1]  # the graph reads it as it is
    assert found["the stem moved"] == [0, 0, 1]


def test_says_why_there_is_no_graph(found):
    first = "no CUDA graph of Stem, Sequential: in 1.blocks.1, hooks on mlp.fc1, which the fused forward does not call"
    assert found["why not"][0] == first
    assert found["hooks"] == [0] * 4


def test_copies_capture_their_own_and_freezing_again_turns_it_off(found):
    assert found["copy"] == found["pickle"] == [0, 0, 1, 1]
    assert found["frozen again"] == found["unfrozen"] == [0] * 4


def test_fused_models_of_other_libraries(found):
    """timm calls its stem separately."""
    for name in ("timm", "transformers"):
        assert [graphs for _, graphs in found[name]] == [0, 0, 1, 1]
        assert found[name][-1][0] < found[name][1][0]
    assert found["transformers, not asked"] == [0] * 4


def test_a_training_step_is_two_graphs(found):
    """Other launches: copies of the image, the logits and their gradient, and those of the loss."""
    assert found["same"]
    assert found["no gradients"]
    assert found["warnings"] == []  # of gradients that are accumulated on the stream of the capture
    assert found["step"] == [8, 2]
    assert found["timm training"] == [8, 2]
    assert found["drawn anew"]
    assert found["fresh"] == 2


def test_graphed_refuses_another_device_and_cached_autocast(found):
    device, caches = found["refused"]
    assert device == "example is on cpu: expected the model's cuda:0"
    assert caches.startswith("autocast caches converted weights: expected torch.autocast(")


def test_gradients_accumulate_outside_of_the_graph(found):
    assert found["in the graph"]  # as autograd leaves them
    assert found["accumulating"] == 2
    assert found["own gradients"]
    assert found["the same own ones"]


def test_other_calls_run_without_a_graph(found):
    assert found["other shape"] == 0
    assert found["evaluation"] == [0]
    assert found["back"] == 2
    assert found["graphed copy"] == found["graphed pickle"] == [0, True]
    assert found["anew"] == [2, 0]
    assert found["moved"] == [["the CUDA graphs of ConvNext are dropped: its layers or parameters changed"], 0]
