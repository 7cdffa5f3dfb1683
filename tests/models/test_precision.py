"""Whole models in 16 bits: logits, loss, gradients and training runs against float64, beside eager PyTorch's error.

Also: one seed gives one result, and recomputation in the backward pass changes gradients only by rounding.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from support import FLOAT32_BOUND, gradients, randomise, relative_error

from convnext_fast import ConvNext, ConvNextConfig, ops
from convnext_fast.backends import reference

MODES = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast to bfloat16": (torch.float32, torch.bfloat16),
    "autocast to float16": (torch.float32, torch.float16),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(fused=True, **fields):
    fields = {"num_stages": 2, "hidden_sizes": [16, 24], "depths": [1, 2], "num_labels": 5, "patch_size": 4, **fields}
    return randomise(ConvNext(ConvNextConfig(**fields), fused=fused))


def autocast(dtype):
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


def step(model, x, labels, mode="float32", scale=1.0):
    """Logits, loss and every gradient."""
    stored, computed = MODES.get(mode, (torch.float64, None))
    model = copy.deepcopy(model).to(stored)
    with autocast(computed):
        logits = model(x.to(stored))
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    found = gradients(model, [loss * scale], [])
    return {"logits": logits, "loss": loss, **{name: value.double() / scale for name, value in found.items()}}


def assert_no_worse(ours, theirs):
    """The geometric mean of the ratios of errors is at most 1.1, with a margin of three standard errors.

    1.1 allows for processors that round 16-bit products in another order, which changes both errors by a few percent.
    """
    ratio = (torch.tensor(ours) / torch.tensor(theirs)).log()
    assert torch.isfinite(ratio).all()
    chance = 3 * ratio.std() / len(ratio) ** 0.5
    assert ratio.mean() <= math.log(1.1) + chance.clamp(max=math.log(2)), (
        f"{ratio.mean().exp():.3f} times eager's, ± {chance:.3f}"
    )


@pytest.mark.parametrize("mode", MODES)
def test_logits_loss_and_gradients_are_as_good_as_eager(mode):
    """All results together on sixteen inputs, and each result in root mean square over the inputs.

    A small tensor of eager's may be accurate by luck: its error counts as no less than the mean of eager's errors.
    """
    fused, eager = build(), build(fused=False)
    squares = [[], []]
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3, 32, 40, generator=generator)
        labels = torch.randint(5, (2,), generator=generator)
        scale = 64.0 if "float16" in mode and "bfloat16" not in mode else 1.0
        exact = step(eager, x, labels, "float64")
        for found, model in zip(squares, (eager, fused), strict=True):
            results = step(model, x, labels, mode, scale)
            found.append([relative_error(results[name], value, 1e-3) ** 2 for name, value in exact.items()])
    theirs, ours = torch.tensor(squares, dtype=torch.float64)
    assert_no_worse(ours.mean(1).sqrt().tolist(), theirs.mean(1).sqrt().tolist())
    bound = 4 * theirs.mean(0).clamp(min=theirs.mean())
    for name, square, most in zip(exact, ours.mean(0), bound, strict=True):
        assert square <= most, name


@pytest.mark.parametrize("fused", [True, False])
def test_tf32_changes_nothing_on_a_cpu(fused):
    model, x, labels = build(fused), torch.randn(2, 3, 32, 40), torch.tensor([0, 1])
    before = step(model, x, labels)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        after = step(model, x, labels)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert all(torch.equal(after[name], value) for name, value in before.items())


# LayerNorm in float16


def written_out(x, eps=1e-6):
    """LayerNorm over channels as a formula in the dtype of x, as in the first ConvNeXt's code for feature maps."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("spread", [300.0, 3000.0, 30000.0])
def test_layer_norm_holds_where_squares_overflow(spread):
    """In float16 a deviation beyond 256 has no finite square. The ops keep their statistics in float32."""
    torch.manual_seed(0)
    x = (torch.randn(2, 6, 6, 48) * spread).clamp(-6e4, 6e4).half()
    exact = written_out(x.double())
    assert relative_error(written_out(x), exact) > 0.5
    identity = torch.zeros(48, 1, 7, 7, dtype=torch.half)
    identity[:, 0, 3, 3] = 1
    ones, zeros = torch.ones(48, dtype=torch.half), torch.zeros(48, dtype=torch.half)
    normalised = ops.dwconv_layernorm(x, identity, None, ones, zeros)
    assert relative_error(normalised, exact) <= 2 * relative_error(exact.half(), exact)
    weight = torch.eye(48, dtype=torch.half)[:, :, None, None].repeat(1, 1, 2, 2) / 4
    down = ops.downsample(x, ones, zeros, weight, None)
    pooled = exact.reshape(2, 3, 2, 3, 2, 48).mean((2, 4))
    eager = reference.downsample(x, ones, zeros, weight, None, 1e-6)
    assert relative_error(down, pooled) <= 2 * relative_error(eager, pooled)


@pytest.mark.parametrize("mode", ["pure", "autocast"])
def test_the_last_stage_stays_accurate_where_its_activations_grow(mode):
    """A residual stream of hundreds in float16: outputs and gradients finite, and as close to float64 as eager's."""
    stored = torch.half if mode == "pure" else torch.float32
    block = build(hidden_sizes=[16, 48]).stages[1].blocks[0]
    torch.manual_seed(1)
    x, dy = torch.randn(2, 48, 7, 7) * 600, torch.randn(2, 48, 7, 7)
    results = []
    for dtype, fused in ((torch.float64, False), (stored, False), (stored, True)):
        twin = copy.deepcopy(block).to(dtype)
        twin.fused = fused
        leaf = x.to(dtype).requires_grad_()
        with autocast(torch.half if mode == "autocast" and dtype == stored else None):
            y = twin(leaf)
        names, parameters = zip(*twin.named_parameters(), strict=True)
        found = torch.autograd.grad(y, [leaf, *parameters], dy.to(y))
        results.append({"y": y, "x": found[0], **dict(zip(names, found[1:], strict=True))})
    exact, eager, fused = results
    assert relative_error(written_out(F.conv2d(x, block.conv_dw.weight, padding=3, groups=48).half()), exact["y"]) > 0.5
    for name, value in exact.items():
        assert torch.isfinite(fused[name]).all(), name
        assert relative_error(fused[name], value) <= 2 * relative_error(eager[name], value), name


def test_under_autocast_the_residual_stream_keeps_what_float16_would_lose():
    """Near 2048 float16 has steps of 2: a branch of 0.25 would vanish, and so would twelve."""
    model = build(hidden_sizes=[8, 16])
    block = model.stages[1].blocks[0]
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.fill_(1.0)
        block.gamma.fill_(0.25)
    x = torch.full((1, 16, 4, 4), 2048.0)
    y = x
    with torch.autocast("cpu", torch.half), torch.no_grad():
        for _ in range(12):
            y = block(y)
    assert y.dtype == torch.float32
    assert torch.equal(y, x + 3.0)


# Training runs


@functools.cache
def losses(fused, mode, seed, steps=16):
    """Losses of a short run with AdamW on random images of distinguishable classes; float16 with a GradScaler.

    At its scale no step is skipped: skipped steps would separate the curves more than rounding does.
    """
    stored, computed = MODES.get(mode, (torch.float64, None))
    model = build(fused, layer_scale_init_value=0.5).to(stored).train()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(20) % 5
    x = (torch.randn(20, 3, 16, 16, generator=generator) + 0.5 * labels[:, None, None, None]).to(stored)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=computed == torch.half)
    found = []
    for _ in range(steps):
        with autocast(computed):
            logits = model(x)
        loss = F.cross_entropy(logits.double(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.detach())
    assert scaler.get_scale() == (1024.0 if computed == torch.half else 1.0)
    return torch.stack(found)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.thorough) if mode == "bfloat16" else mode for mode in MODES]
)
def test_a_training_run_follows_the_exact_curve_as_closely_as_eager(mode):
    distances = [[], []]
    for seed in range(8):
        exact = losses(False, "float64", seed)
        assert exact[-1] < 0.7 * exact[0]
        for found, fused in zip(distances, (False, True), strict=True):
            found.append((losses(fused, mode, seed) - exact).norm().item())
    assert_no_worse(distances[1], distances[0])


# Determinism


@pytest.mark.parametrize("fused", [False, True])
def test_one_seed_gives_the_same_bits(fused):
    model = build(fused, drop_path_rate=0.3).train()
    x, labels = torch.randn(3, 3, 32, 40), torch.tensor([0, 1, 2])
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(step(model, x, labels))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(runs[1][name], value) for name, value in runs[0].items())


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_changes_gradients_only_by_rounding(mode):
    model = build().train()
    x, labels = torch.randn(3, 3, 32, 40), torch.tensor([0, 1, 2])
    results = []
    for level in (0, 1, 2):
        model.recompute = level
        results.append(step(model, x, labels, mode))
    exact = step(build(fused=False), x, labels, "float64")
    for result in results[1:]:
        for name, value in results[0].items():
            bound = max(relative_error(value, exact[name]), FLOAT32_BOUND)
            assert relative_error(result[name], value) <= 2 * bound, name
