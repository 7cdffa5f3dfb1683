"""A whole model's training step and the demo's digits through every kernel in Triton's interpreter."""

import pytest
import torch
from model_cases import check_digits, check_training_step, small_model

from convnext_fast.backends import environment, gpu


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(environment, "REQUEST", "triton")


@pytest.mark.parametrize(("dtype", "recompute"), [(torch.float32, 0), (torch.float32, 2), (torch.float16, 1)])
def test_training_step(dtype, recompute):
    check_training_step(dtype, recompute, lambda run: run())


def test_digits():
    check_digits(8, torch.float32, lambda run: run())


@torch.no_grad()
def test_a_frozen_model_is_one_call_with_the_bits_of_its_steps(monkeypatch):
    calls, steps_as_one = [], gpu.steps

    def counted(x, steps, ends, dtype):
        calls.append((len(steps), ends))
        return steps_as_one(x, steps, ends, dtype)

    monkeypatch.setattr(gpu, "steps", counted)
    model = small_model(torch.float32).eval().freeze()
    x = torch.randn(2, 3, 40, 28)
    logits, (last, maps) = model(x), model.forward_intermediates(x)
    assert calls == [(4, (3,)), (4, (0, 1, 3))]  # the stem and the stages; the stem and each stage
    model.stages[0].blocks[0].register_forward_hook(lambda module, args, output: None)  # now modules are called
    assert torch.equal(model(x), logits)
    again = model.forward_intermediates(x)
    assert all(map(torch.equal, (again[0], *again[1]), (last, *maps)))


@torch.no_grad()
@pytest.mark.parametrize("frozen", [True, False])
def test_a_compiled_model_is_one_call_and_notices_changes(frozen, monkeypatch):
    calls, steps_as_one = [], gpu.steps
    monkeypatch.setattr(gpu, "steps", lambda *arguments: calls.append(arguments[2]) or steps_as_one(*arguments))
    torch.compiler.reset()
    model, x = small_model(torch.float32).eval(), torch.randn(2, 3, 40, 28)
    if frozen:
        model.freeze()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(x)
    assert calls == [(3,)]
    for change in (lambda w: w.mul_(-1), lambda w: w.data.add_(1)):
        change(model.stages[0].blocks[0].mlp.fc1.weight)
        after = compiled(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, model(x))
        before = after
