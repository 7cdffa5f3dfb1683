"""Frozen blocks in one go: the same bits as block by block, and whatever looks on is called as ever."""

import copy

import pytest
import torch
from support import no_worse, randomise
from torch import nn

from convnext_fast import ConvNext, ConvNextConfig, ConvNextModel, chain, compiled
from convnext_fast.frozen_ops import frozen_blocks, frozen_downsample, stem

launching = pytest.importorskip("convnext_fast.kernels.cpu.launching", reason="needs llvmlite")
from convnext_fast.kernels.cpu.machine import AVX2  # noqa: E402

pytestmark = pytest.mark.skipif(not launching.has(AVX2), reason="these kernels need x86, Linux and AVX2")
CONFIG = ConvNextConfig(num_stages=2, hidden_sizes=[16, 24], depths=[3, 2], num_labels=40)


@pytest.fixture(params=[ConvNext, ConvNextModel])
def model(request):
    return randomise(request.param(CONFIG)).eval().freeze()


def output(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


def check(got, model, x):
    """Against the plain model in float64; no worse than twice the plain model in float32."""
    assert no_worse(got, plain(model, x, torch.float64), plain(model, x, torch.float32))


def plain(model, x, dtype):
    copied = copy.deepcopy(model)
    copied.fused = False
    return output(copied.to(dtype), x.to(dtype))


@pytest.fixture
def chains(monkeypatch):
    """How many blocks each chain had."""
    lengths = []
    run = compiled.run_chain
    monkeypatch.setattr(compiled, "run_chain", lambda blocks, x: lengths.append(len(blocks)) or run(blocks, x))
    return lengths


def stages(model):
    return model.stages if isinstance(model, ConvNext) else model.encoder.stages


def blocks_of(model, stage):
    return stages(model)[stage].blocks if isinstance(model, ConvNext) else stages(model)[stage].layers


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_equal_bits(model, chains, mode, monkeypatch):
    x = torch.randn(2, 3, 70, 66)
    given = x.clone()
    with mode():
        got = output(model, x)
        assert chains == [3, 2]
        assert torch.equal(output(model, x), got)
        assert torch.equal(x, given)
        for module in ("model", "huggingface"):
            monkeypatch.setattr(f"convnext_fast.{module}.in_one_go", lambda blocks, x: None)
        assert torch.equal(output(model, x), got)
    assert chains == [3, 2] * 2


def test_the_input_is_not_overwritten_and_the_result_is_anyones(model):
    blocks = blocks_of(model, 0)
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    given = x.clone()
    with torch.no_grad():
        y = chain.in_one_go(blocks, x)
        again = chain.in_one_go(blocks, x)
        y += 1
    assert torch.equal(x, given)
    assert torch.equal(y, again + 1)
    y.requires_grad_().sum().backward()


def test_weights_whose_memory_moves(model):
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = output(model, x)
        model.share_memory()
        filler = [torch.full((size,), float("nan")) for size in (16, 24, 32, 48, 64, 96, 128, 192) for _ in range(200)]
        assert torch.equal(output(model, x), expected)
    assert filler


def test_what_a_block_refuses_a_chain_refuses(model):
    x = torch.randn(1, 3, 32, 32)
    block = blocks_of(model, 0)[1]
    conv = block.parts().dwconv
    plain = conv.weight
    with torch.no_grad():
        output(model, x)
        for bad, error in (
            (plain.double(), "the activations are torch.float32 but dwconv_weight is torch.float64"),
            (plain[..., :4, :4].clone(), "expected a square one of side 3, 5 or 7"),
            (plain.to("meta"), "is on meta"),
        ):
            block.unfreeze()
            conv.weight = nn.Parameter(bad, requires_grad=False)
            block.freeze()
            with pytest.raises((TypeError, ValueError), match=error):
                output(model, x)


def test_gradients_go_block_by_block(model, chains):
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    output(model, x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not chains


@pytest.mark.parametrize("where", ["block", "container", "everywhere"])
def test_hooks_fire(model, chains, where):
    seen = []
    if where == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(lambda module, x, y: seen.append(type(module)))
    else:
        blocks = blocks_of(model, 0)
        holder = blocks[1] if where == "block" else blocks
        handle = holder.register_forward_hook(lambda module, x, y: seen.append(module))
    try:
        with torch.no_grad():
            output(model, torch.randn(1, 3, 32, 32))
    finally:
        handle.remove()
    if where == "everywhere":
        assert seen.count(type(blocks_of(model, 0)[0])) == 5
        assert not chains
    else:
        assert seen == ([] if isinstance(holder, nn.ModuleList) else [holder])  # a ModuleList is not called
        assert chains == [2]


def test_what_was_done_to_a_block_counts(model, chains):
    x = torch.randn(1, 3, 32, 32)
    block = blocks_of(model, 0)[1]
    with torch.no_grad():
        before = output(model, x)
        block.forward = lambda x: 2 * x
        changed = output(model, x)
        del block.forward
        assert not torch.equal(changed, before)
        block.unfreeze()
        check(output(model, x), model, x)
        block.freeze()
        assert torch.equal(output(model, x), before)
        replaced = nn.LayerNorm(16)
        name = "norm" if isinstance(model, ConvNext) else "layernorm"
        setattr(block, name, replaced)
        replaced.register_forward_hook(lambda *_: None)
        with pytest.warns(RuntimeWarning, match="calls its layers one by one"):
            output(model, x)
    assert chains == [3, 2, 2, 2, 3, 2, 2]


def test_a_mode_that_looks_on_sees_the_blocks(model, chains):
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.namespace + "." + func._opname)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        output(model, torch.randn(1, 3, 32, 32))
    assert names.count("convnext_fast.frozen_block_fwd") == 5
    assert not chains


def test_a_compiled_model_calls_one_operator_a_stage(model, chains):
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        compiled_model = torch.compile(model, fullgraph=True)
        check(output(compiled_model, x), model, x)
        x = torch.randn(3, 3, 48, 36)
        check(output(compiled_model, x), model, x)
    assert chains == [3, 2] * 2


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(model, bias):
    frozen = [block.frozen for block in blocks_of(model, 0)]
    weights = [weight for block in frozen for weight in block]
    if not bias:
        weights[1] = torch.empty(0)
    arguments = torch.randn(2, 9, 9, 16), weights, [1e-6] * 3, "gelu"
    check_operator(frozen_blocks, *arguments)
    check_operator(frozen_blocks, torch.empty(0, 9, 9, 16), *arguments[1:])


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_of_patches(bias):
    weight, vectors = torch.randn(24, 16, 2, 2), torch.randn(3, 24)
    for samples in (0, 2):
        check_operator(frozen_downsample, torch.randn(samples, 9, 8, 16), weight, vectors[0], 1e-6)
        image, first = torch.randn(samples, 3, 17, 18), torch.randn(24, 3, 4, 4)
        check_operator(stem, image, first, vectors[0] if bias else None, *vectors[1:], 1e-6)


def check_operator(operator, *arguments):
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_no_kernel_serves(chains):
    model = randomise(ConvNext(ConvNextConfig(num_stages=1, hidden_sizes=[12], depths=[2]))).eval().freeze()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        check(model(x), model, x)
        check(torch.compile(model, fullgraph=True)(x), model, x)
    assert not chains
