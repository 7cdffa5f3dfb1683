"""``convnext-fast bench``: the comparison of a model before and after `fuse`."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from fuse_support import one_thread  # noqa: F401
from support import FLOAT32_BOUND, randomise
from transformers import ConvNextConfig, ConvNextForImageClassification

from convnext_fast import cli
from convnext_fast.backends import choose
from convnext_fast.cli.bench import compare, load_model


@pytest.fixture
def model():
    config = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, num_labels=3)
    return randomise(ConvNextForImageClassification(config))


def test_compares_and_changes_nothing(model):
    state, mode = copy.deepcopy(model.state_dict()), model.training
    found = compare(model, torch.randn(2, 3, 32, 32), rounds=1)
    assert len(found.report.fused) == 2
    assert found.output_error <= FLOAT32_BOUND
    assert 0 < found.gradient_error <= 10 * FLOAT32_BOUND
    assert found.path == choose.select(torch.device("cpu"), torch.float32)
    assert all(cost.seconds > 0 for cost in (*found.forward, *found.training))
    assert [cost.peak for cost in found.forward] == [0, 0]
    before, after = (cost.peak for cost in found.training)
    assert 0 < after < before
    assert "fused by" not in repr(model)
    assert model.training == mode
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class LargerOnceFused(torch.nn.Module):
    """Multiplies its model's logits by 1.01 once that is fused."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits * (1.01 if "fused by" in repr(self.model) else 1.0)


def test_disagreement_shows(model):
    """The error is measured, not assumed: of outputs that are 1 % larger, and gradients of their squares."""
    found = compare(LargerOnceFused(model), torch.randn(2, 3, 32, 32), rounds=1)
    assert found.output_error == pytest.approx(0.01, rel=1e-3)
    assert found.gradient_error == pytest.approx(0.0201, rel=1e-3)


def test_autocast_is_compared(model):
    """In bfloat16 the fused backward rounds elsewhere."""
    found = compare(model, torch.randn(2, 3, 32, 32), torch.bfloat16, rounds=1)
    assert found.output_error < 0.1
    assert 1e-4 < found.gradient_error < 0.1


def test_command(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    model.save_pretrained(tmp_path)
    argv = ["bench", "--model", f"hf:{tmp_path}", "--image-size", "32", "--batch-size", "2", "--rounds", "1"]
    assert cli.main([*argv, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "4 of 4 fused: 2 blocks, 2 patch layers" in text
    assert len(re.findall(r"images/s", text)) == 4
    assert re.search(r"Outputs within \d\.\de-\d\d .* gradients within \d\.\de-\d\d", text, re.DOTALL)


def test_a_model_without_blocks_fails(tmp_path, capsys):
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path)
    argv = ["bench", "--model", f"hf:{tmp_path}", "--image-size", "32", "--batch-size", "1", "--rounds", "1"]
    assert cli.main([*argv, "--device", "cpu"]) == 1
    assert "no ConvNeXt block found" in capsys.readouterr().out


@pytest.mark.parametrize("spec", ["convnext_tiny", "keras:x", "timm:", ":x", ""])
def test_wrong_model_is_refused(spec, capsys):
    assert cli.main(["bench", "--model", spec]) == 1
    assert "expected timm:NAME, torchvision:NAME or hf:DIR" in capsys.readouterr().err


def test_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises((OSError, ValueError)):
        load_model(f"hf:{tmp_path}/nothing")
