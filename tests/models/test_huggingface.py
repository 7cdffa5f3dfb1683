"""The transformers-shaped models against transformers itself: same weights, same outputs, losses and gradients."""

from __future__ import annotations

import pytest
import torch
import transformers
from support import BOUNDS, gradients, randomise, relative_error

import convnext_fast
import convnext_fast.models.outputs

CONFIGS = [
    {"hidden_sizes": [11, 24, 30, 52], "depths": [1, 2, 1, 1], "num_labels": 5},
    {"hidden_sizes": [8, 17], "depths": [2, 1], "num_stages": 2, "num_labels": 3, "layer_scale_init_value": 0.0},
    {"hidden_sizes": [7, 9, 13], "depths": [1, 0, 2], "num_stages": 3, "num_channels": 1, "hidden_act": "silu"},
    {"hidden_sizes": [16, 16, 16], "depths": [1, 1, 1], "num_stages": 3, "patch_size": 2, "hidden_act": "gelu_new"},
    {"hidden_sizes": [5, 40, 21, 33], "depths": [1, 1, 1, 1], "num_channels": 4, "hidden_act": "relu", "num_labels": 1},
    {"hidden_sizes": [19], "depths": [3], "num_stages": 1, "patch_size": 3, "hidden_act": "swish", "num_labels": 9},
]
SIZES = [(37, 64), (33, 32), (45, 70), (32, 41), (96, 35), (20, 23)]
CASES = list(zip(CONFIGS, SIZES, strict=True))


def pair(name, fields, dtype, fused, **more):
    """transformers' model and ours with the same random weights."""
    # transformers' backbone adds a list and a tuple: it needs lists.
    theirs = getattr(transformers, name)(transformers.ConvNextConfig(**fields, **more)).to(dtype)
    randomise(theirs)
    ours = getattr(convnext_fast, name)(convnext_fast.ConvNextConfig(**fields, **more), fused=fused, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def labels_for(num_labels, batch, dtype):
    return torch.randn(batch, dtype=dtype) if num_labels == 1 else torch.randint(0, num_labels, (batch,))


def compare(theirs, ours, x, run, bound):
    """Outputs and every gradient of one call of both models; ``run`` returns a list of tensors."""
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(7)
        outputs = run(model, leaf)
        results.append(({f"output {i}": o for i, o in enumerate(outputs)}, gradients(model, outputs, [leaf])))
    (their_outputs, their_grads), (our_outputs, our_grads) = results
    for expected, actual in ((their_outputs, our_outputs), (their_grads, our_grads)):
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            if value is None:
                assert actual[key] is None
            else:
                assert relative_error(actual[key], value) <= bound, key


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, True), (torch.float64, False)])
@pytest.mark.parametrize(("fields", "size"), CASES)
def test_classifier(fields, size, dtype, fused):
    theirs, ours = pair("ConvNextForImageClassification", fields, dtype, fused, drop_path_rate=0.3)
    theirs.train(), ours.train()
    torch.manual_seed(0)
    x = torch.randn(3, fields.get("num_channels", 3), *size, dtype=dtype)
    labels = labels_for(ours.config.num_labels, 3, dtype)

    def run(model, leaf):
        out = model(pixel_values=leaf, labels=labels, output_hidden_states=True)
        assert len(out.hidden_states) == len(fields["depths"]) + 1
        return [out.loss, out.logits, *out.hidden_states]

    compare(theirs, ours, x, run, BOUNDS[dtype])


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, False)])
@pytest.mark.parametrize(("fields", "size"), CASES[:3])
def test_base_model(fields, size, dtype, fused):
    theirs, ours = pair("ConvNextModel", fields, dtype, fused)
    x = torch.randn(2, fields.get("num_channels", 3), *size, dtype=dtype)

    def run(model, leaf):
        out = model(leaf, output_hidden_states=True)
        assert out.last_hidden_state.shape == out.hidden_states[-1].shape
        return [out.last_hidden_state, out.pooler_output, *out.hidden_states]

    compare(theirs, ours, x, run, BOUNDS[dtype])


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, False)])
@pytest.mark.parametrize(
    "chosen",
    [{"out_features": ["stem", "stage2"]}, {"out_indices": [-1]}, {"out_features": ["stage1", "stage3"]}, {}],
)
def test_backbone(chosen, dtype, fused):
    fields = {"hidden_sizes": [11, 24, 30], "depths": [1, 2, 1], "num_stages": 3, **chosen}
    theirs, ours = pair("ConvNextBackbone", fields, dtype, fused)
    for name in ("out_features", "channels", "stage_names", "num_features"):
        assert list(getattr(ours, name)) == list(getattr(theirs, name)), name
    assert ours.out_indices == [i % len(ours.stage_names) for i in theirs.out_indices]
    x = torch.randn(2, 3, 40, 37, dtype=dtype)

    def run(model, leaf):
        out = model(leaf)
        assert len(out.feature_maps) == len(ours.channels)
        assert [m.shape[1] for m in out.feature_maps] == ours.channels
        return list(out.feature_maps)

    compare(theirs, ours, x, run, BOUNDS[dtype])
    with torch.no_grad():
        kept = ours(x, output_hidden_states=True).hidden_states
        assert all(
            relative_error(a, b) <= BOUNDS[dtype]
            for a, b in zip(kept, theirs(x, output_hidden_states=True).hidden_states, strict=True)
        )
        assert ours(x).hidden_states is None


def test_default_backbone_configuration_works():
    config = convnext_fast.ConvNextConfig(hidden_sizes=(8, 12, 16, 20), depths=(1, 1, 1, 1))
    model = convnext_fast.ConvNextBackbone(config)
    assert model.out_features == ["stage4"]
    assert model.num_features == [8, 8, 12, 16, 20]
    assert model.out_feature_channels["stage2"] == 12


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        (None, 1, torch.tensor([0.3, -1.0])),
        (None, 1, torch.tensor([[0.3], [-1.0]])),
        (None, 4, torch.tensor([3, 0])),
        (None, 4, torch.tensor([3, -100])),
        (None, 4, torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])),
        ("regression", 4, torch.randn(2, 4)),
        ("single_label_classification", 4, torch.tensor([3, 0], dtype=torch.int32)),
        ("multi_label_classification", 4, torch.ones(2, 4)),
    ],
)
def test_losses(problem_type, num_labels, labels):
    fields = {"hidden_sizes": [8], "depths": [1], "num_stages": 1, "num_labels": num_labels}
    theirs, ours = pair("ConvNextForImageClassification", fields, torch.float32, True, problem_type=problem_type)
    x = torch.randn(2, 3, 32, 32)
    theirs_labels = labels.long() if labels.dtype == torch.int32 else labels
    expected = theirs(pixel_values=x, labels=theirs_labels).loss
    assert relative_error(ours(pixel_values=x, labels=labels).loss, expected) <= BOUNDS[torch.float32]


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (1, torch.tensor([0.3, -1.0])),
        (4, torch.tensor([3, 0])),
        (4, torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])),
        (4, torch.tensor([[0.25, 0.25, 0.5, 0.0], [0.1, 0.2, 0.3, 0.4]])),
        (2, torch.tensor([1, 0], dtype=torch.int32)),
    ],
    ids=["regression", "classes", "one-hot floats", "soft labels", "int32"],
)
def test_the_problem_is_remembered(num_labels, labels, tmp_path):
    """A saved model behaves as it did in training."""
    fields = {"hidden_sizes": [8], "depths": [1], "num_stages": 1, "num_labels": num_labels}
    theirs, ours = pair("ConvNextForImageClassification", fields, torch.float32, True)
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises((TypeError, ValueError)):
        ours(x, labels=torch.zeros(3, 7))
    assert ours.config.problem_type is None
    loss = ours(x, labels=labels).loss
    expected = theirs(x, labels=labels if labels.dtype != torch.int32 else labels.long()).loss
    assert relative_error(loss, expected) <= BOUNDS[torch.float32]
    assert ours.config.problem_type == theirs.config.problem_type
    with pytest.raises(TypeError, match=r"config\.problem_type, which the first labels set"):
        ours(x, labels=labels.long() if labels.is_floating_point() else labels.float())
    ours.save_pretrained(tmp_path)
    for library in (convnext_fast, transformers):
        read = library.ConvNextForImageClassification.from_pretrained(tmp_path)
        assert read.config.problem_type == theirs.config.problem_type
        assert (
            relative_error(
                read(x, labels=labels.to(read.dtype) if labels.is_floating_point() else labels.long()).loss, loss
            )
            <= 1e-5
        )


def test_integer_labels_with_one_output_are_an_error():
    config = convnext_fast.ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1, num_labels=1)
    with pytest.raises(TypeError, match=r"labels are torch.int64: expected floats for regression"):
        convnext_fast.ConvNextForImageClassification(config)(torch.randn(2, 3, 32, 32), labels=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="single_label_classification"):
        convnext_fast.ConvNextConfig(num_labels=1, problem_type="single_label_classification")


@pytest.mark.parametrize(
    ("labels", "problem_type", "error", "message"),
    [
        (torch.tensor([1]), None, ValueError, r"labels have shape \(1,\): expected \(2,\)"),
        (torch.randn(2, 3), None, ValueError, r"expected \(2, 4\) for multi_label"),
        (torch.tensor([1.0, 2.0]), "single_label_classification", TypeError, "expected integer class indices"),
        (torch.tensor([1, 2]), "regression", TypeError, "expected floats for regression"),
        ([1, 2], None, TypeError, "labels is a list: expected a tensor"),
    ],
)
def test_bad_labels_are_named(labels, problem_type, error, message):
    config = convnext_fast.ConvNextConfig(
        num_stages=1, hidden_sizes=[8], depths=[1], num_labels=4, problem_type=problem_type
    )
    model = convnext_fast.ConvNextForImageClassification(config)
    with pytest.raises(error, match=message):
        model(torch.randn(2, 3, 32, 32), labels=labels)


def test_outputs_by_attribute_key_and_index():
    config = convnext_fast.ConvNextConfig(num_stages=1, hidden_sizes=[8], depths=[1], num_labels=4)
    model = convnext_fast.ConvNextForImageClassification(config).eval()
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    out = model(x)
    assert list(out) == ["logits"]
    assert out.loss is None
    assert out[0] is out.logits is out["logits"]
    out = model(x, labels=labels, output_hidden_states=True)
    assert list(out.keys()) == ["loss", "logits", "hidden_states"]
    assert out[:2] == (out.loss, out.logits)
    assert "loss" in out
    with pytest.raises(KeyError, match="this output holds"):
        out["attentions"]
    loss, logits = model(x, labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    out["loss"] = loss * 2
    assert torch.equal(out.loss, loss * 2)
    with pytest.raises(KeyError, match="this output holds"):
        out["attentions"] = loss


def test_outputs_are_put_together_as_libraries_do():
    """accelerate makes an output from a dict, `torch.nn.DataParallel` from pairs."""
    logits, states = torch.randn(2, 3), (torch.randn(1), torch.randn(1))
    first = convnext_fast.models.outputs.ImageClassifierOutput(logits=logits, hidden_states=states)
    again = type(first)({key: value.double() if key == "logits" else value for key, value in first.items()})
    assert again.loss is None
    assert torch.equal(again.logits, logits.double())
    assert again.hidden_states == states
    loss = torch.tensor(1.0)
    paired = type(first)((key, value) for key, value in {"loss": loss, "logits": logits}.items())
    assert (paired.loss, paired.logits, paired.hidden_states) == (loss, logits, None)
    with pytest.raises(ValueError, match=r"of the fields \['scores'\]: expected some of"):
        type(first)({"scores": logits})
    lists = torch.utils._pytree.tree_map(lambda value: value.tolist(), first)
    assert lists.logits == logits.tolist()
    assert convnext_fast.models.outputs.BackboneOutput(feature_maps=[logits, logits])[0] == [logits, logits]


def test_the_attributes_that_transformers_trainer_needs():
    model = convnext_fast.ConvNextForImageClassification(convnext_fast.ConvNextConfig(**CONFIGS[1])).train()
    assert model.num_parameters(exclude_embeddings=True) == sum(p.numel() for p in model.parameters())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    x = torch.randn(2, 3, 33, 32, requires_grad=True)
    model(x, labels=torch.tensor([0, 1])).loss.backward()
    assert x.grad is not None


def test_fields_of_a_configuration_behave_as_in_transformers():
    config = convnext_fast.ConvNextConfig(num_stages=1, hidden_sizes=[8], depths=[1], made_by="me")
    assert config.made_by == "me"
    with pytest.raises(AttributeError, match="made_for"):
        config.made_for  # noqa: B018
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.output_hidden_states = True
    model = convnext_fast.ConvNextForImageClassification(config).eval()
    x = torch.randn(1, 3, 32, 32)
    assert len(model(x).hidden_states) == 2
    assert model(x, output_hidden_states=False).hidden_states is None
    config.return_dict = False
    assert [type(value) for value in model(x)] == [torch.Tensor, tuple]
    assert convnext_fast.ConvNextConfig.from_dict(config.to_dict()) == config


def test_options_of_from_pretrained(tmp_path):
    theirs = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**CONFIGS[0]))
    theirs.save_pretrained(tmp_path)
    names = {0: "a", 1: "b", 2: "c"}
    labels = {"num_labels": 3, "id2label": names, "label2id": {"a": 0, "b": 1, "c": 2}}
    with pytest.warns(UserWarning, match="newly initialises what has another size"):
        model = convnext_fast.ConvNextForImageClassification.from_pretrained(
            tmp_path, ignore_mismatched_sizes=True, problem_type="multi_label_classification", **labels
        )
    assert model.config.id2label == names
    assert model.config.problem_type == "multi_label_classification"
    assert model.classifier.out_features == 3
    backbone = convnext_fast.ConvNextBackbone
    with pytest.warns(UserWarning, match="newly initialises"):
        model = backbone.from_pretrained(tmp_path, out_features=["stage1", "stage2"], torch_dtype="float16")
    assert model.channels == [11, 24]
    assert model.dtype == torch.float16
    options = {"dtype": "auto", "torch_dtype": None, "device_map": {"": "cpu"}, "drop_path_rate": 0.2}
    made = convnext_fast.ConvNextModel.from_pretrained(tmp_path, **options)
    assert (made.dtype, made.config.drop_path_rate) == (torch.float32, 0.2)
    with pytest.raises(TypeError, match="got heads: expected arguments of ConvNextModel"):
        convnext_fast.ConvNextModel.from_pretrained(tmp_path, heads=3)
    with pytest.raises(ValueError, match="num_labels is 3 but id2label names 2 classes"):
        backbone.from_pretrained(tmp_path, num_labels=3, id2label={0: "a", 1: "b"})
    with pytest.raises(TypeError, match="dtype is 'float12'"):
        convnext_fast.ConvNextModel.from_pretrained(tmp_path, dtype="float12")


def test_gradient_checkpointing_keeps_gradients():
    config = convnext_fast.ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[2, 2], drop_path_rate=0.5)
    model = randomise(convnext_fast.ConvNextForImageClassification(config, dtype=torch.float64)).train()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    results = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        torch.manual_seed(0)
        results.append(gradients(model, [model(x).logits], []))
    assert model.is_gradient_checkpointing
    assert all(relative_error(results[1][k], v) <= BOUNDS[torch.float64] for k, v in results[0].items())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(2, 4, 32, 32), ValueError, r"pixel_values has shape .*: expected \(N, 3, H, W\)"),
        (torch.randn(3, 32, 32), ValueError, "pixel_values has shape"),
        (torch.randn(2, 3, 16, 64), ValueError, "16×64 pixels: expected at least 32×32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "rescale and normalise"),
        (None, TypeError, "pixel_values is a NoneType"),
        (torch.randn(1, 3, 32, 32, dtype=torch.float64), (TypeError, RuntimeError), "dtype|float|double|Double"),
    ],
)
def test_bad_pixels_are_named(x, error, message):
    config = convnext_fast.ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1])
    for cls in (convnext_fast.ConvNextModel, convnext_fast.ConvNextBackbone):
        with pytest.raises(error, match=message):
            cls(config)(x)
    with pytest.raises(TypeError, match="config is a dict"):
        convnext_fast.ConvNextModel({})


def test_traced_with_the_encoder_as_a_leaf():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return name in ("embeddings", "encoder") or super().is_leaf_module(module, name)

    asked = {"output_hidden_states": False, "return_dict": False}
    config = convnext_fast.ConvNextConfig(num_stages=1, hidden_sizes=[8], depths=[1])
    nodes = Tracer().trace(convnext_fast.ConvNextModel(config), concrete_args=asked).nodes
    assert [node.target for node in nodes if node.op == "call_module"][:2] == ["embeddings", "encoder"]
