"""Our models in transformers' Trainer, beside its own: what is saved, logged, predicted and recomputed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from support import randomise

import convnext_fast

NEEDED = ("accelerate", "tensorboard")
LABELS = {0: "cat", 1: "dog", 2: "eel"}
SIZES = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 2], "id2label": LABELS}
SIZES["label2id"] = {name: i for i, name in LABELS.items()}


class RandomImages(torch.utils.data.Dataset):
    def __init__(self, count, labelled=True):
        generator = torch.Generator().manual_seed(4)
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator) if labelled else None

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        item = {"pixel_values": self.pixels[i]}
        return item if self.labels is None else {**item, "labels": self.labels[i]}


def model_of(library):
    config = library.ConvNextConfig(**SIZES)
    return randomise(library.ConvNextForImageClassification(config))


def trainer_of(library, folder, **options):
    settings = {"num_train_epochs": 1, "save_strategy": "epoch", "logging_steps": 1, "learning_rate": 1e-3}
    settings |= {"report_to": ["tensorboard"], "use_cpu": True, "disable_tqdm": True, "seed": 3}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=4, **settings | options
    )
    return transformers.Trainer(
        model_of(library),
        arguments,
        train_dataset=RandomImages(8),
        eval_dataset=RandomImages(6),
        processing_class=library.ConvNextImageProcessor(size={"shortest_edge": 32}),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both trainers after an epoch, with their folders."""
    made = {}
    for library in (transformers, convnext_fast):
        folder = tmp_path_factory.mktemp(library.__name__)
        trainer = trainer_of(library, folder)
        trainer.train()
        trainer.save_model(folder / "saved")
        made[library] = trainer, folder
    return made


def test_the_same_weights_are_trained(trained):
    theirs, ours = (trained[library][0].model.state_dict() for library in (transformers, convnext_fast))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-4, atol=1e-5), name


def test_what_is_saved_opens_in_both_libraries(trained):
    trainer, folder = trained[convnext_fast]
    state, x = trainer.model.state_dict(), RandomImages(2).pixels
    places = [folder / "saved", *folder.glob("checkpoint-*")]
    assert len(places) == 2
    for place in places:
        assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {p.name for p in place.iterdir()}
        for library in (transformers, convnext_fast):
            model = library.ConvNextForImageClassification.from_pretrained(place)
            assert model.config.id2label == LABELS
            assert model.config.problem_type == "single_label_classification"
            assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
            assert model(x).logits.shape == (2, 3)
            assert library.ConvNextImageProcessor.from_pretrained(place).size["shortest_edge"] == 32


def test_tensorboard_holds_the_configuration(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next(trained[convnext_fast][1].rglob("events.out.tfevents*"))
    log = EventAccumulator(str(events.parent)).Reload()
    text = log.Tensors("model_config/text_summary")[0].tensor_proto.string_val[0]
    assert json.loads(text)["id2label"] == {str(i): name for i, name in LABELS.items()}


def arrays(value):
    return [a for item in value for a in arrays(item)] if isinstance(value, (tuple, list)) else [np.asarray(value)]


@pytest.mark.parametrize("ignored", [None, ["hidden_states"], ["logits"]])
@pytest.mark.parametrize("labelled", [True, False])
def test_predictions_are_arrays(labelled, ignored, trained):
    results = []
    for library in (transformers, convnext_fast):
        trainer = trained[library][0]
        trainer.compute_metrics = None
        trainer.model.config.output_hidden_states = True
        results.append(trainer.predict(RandomImages(5, labelled), ignore_keys=ignored))
        trainer.model.config.output_hidden_states = False
    theirs, ours = (arrays(result.predictions) for result in results)
    assert [a.shape for a in ours] == [a.shape for a in theirs]
    assert all(np.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(ours, theirs, strict=True))
    assert (results[1].label_ids is None) == (not labelled)
    assert results[1].metrics.keys() == results[0].metrics.keys()


def test_evaluation(trained):
    found = [trained[library][0].evaluate() for library in (transformers, convnext_fast)]
    assert found[0].keys() == found[1].keys()
    assert found[1]["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, tmp_path, trained):
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    name = "activation" if release >= (5, 20) else "gradient"
    options = {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = trainer_of(convnext_fast, tmp_path, **options)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing
    state = trained[convnext_fast][0].model.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.allclose(tensor, state[name], rtol=1e-4, atol=1e-5), name


def test_devices_by_module(tmp_path):
    model = model_of(convnext_fast)
    model.save_pretrained(tmp_path)
    whole = {"convnext.embeddings": "cpu", "convnext.encoder": "cpu", "convnext.layernorm": "cpu", "classifier": "cpu"}
    for device_map in ("auto", "balanced", "sequential", whole):
        read = convnext_fast.ConvNextForImageClassification.from_pretrained(tmp_path, device_map=device_map)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.state_dict().items())
    del whole["classifier"]
    with pytest.raises(ValueError, match="classifier"):
        convnext_fast.ConvNextForImageClassification.from_pretrained(tmp_path, device_map=whole)
