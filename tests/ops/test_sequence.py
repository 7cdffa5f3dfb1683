"""Frozen models as one sequence: the same bits as block by block, and every hook and mode sees the same as before."""

import itertools

import pytest
import torch
from sequence_support import (
    CONFIG,
    KINDS,
    WHOLE,
    blocks_of,
    check,
    downsampling,
    dwconv_of,
    in_turn,
    needs_kernels,
    output,
    stages,
    stem_of,
)
from support import randomise
from torch import nn

from convnext_fast import ConvNext, ConvNextBackbone, ConvNextConfig, ConvNextModel
from convnext_fast.models.freezing import freeze, state_of, unfreeze
from convnext_fast.models.layers import Stem
from convnext_fast.models.plan import ChainPlan
from convnext_fast.models.whole_runs import WholeRuns, outputs_of

pytestmark = needs_kernels
thorough = pytest.mark.thorough


@pytest.fixture
def one_by_one(monkeypatch):
    """A function after which modules are called one by one."""

    def forbid():
        def of_blocks(runs, root, parts, x, *last):
            containers = root is None or isinstance(state_of(root).plan, ChainPlan)
            return None if containers else outputs_of(runs, root, parts, x, *last)

        for module in ("switches", "fused_module"):
            monkeypatch.setattr(f"convnext_fast.models.{module}.outputs_of", of_blocks)

    return forbid


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equal_bits(model, chains, mode, layout, one_by_one):
    x = torch.randn(2, 3, 70, 66).contiguous(memory_format=layout)
    given = x.clone()
    with mode():
        got = output(model, x)
        assert chains == [WHOLE]
        assert torch.equal(output(model, x), got)
        assert torch.equal(x, given)
        one_by_one()
        assert torch.equal(output(model, x), got)
    assert chains == [WHOLE] * 2


@pytest.mark.parametrize(
    ("model", "compile_"),
    [(ConvNext, False), (ConvNextModel, False), (ConvNext, True), pytest.param(ConvNextModel, True, marks=thorough)],
    indirect=["model"],
)
def test_grad_mode_without_a_gradient_to_record(model, chains, compile_):
    """As in a script without ``no_grad``."""
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compile_ else model
    x = torch.randn(2, 3, 40, 36)
    got = output(called, x)
    assert not got.requires_grad
    assert chains == [WHOLE]
    check(got, model, x)
    got += 1
    stem_of(model).requires_grad_(True)
    if compile_ and torch.__version__.startswith("2.9."):
        pytest.skip("PyTorch 2.9 compiles nothing anew where a parameter asks for gradients again")
    assert output(called, x).requires_grad
    assert chains == [WHOLE]


@pytest.mark.parametrize("depths", [[1, 1], [3, 2], [2, 1]])
@torch.no_grad()
def test_intermediate_feature_maps(depths, chains, one_by_one):
    """All maps that models return, for numbers of blocks with which a stage ends in either of two buffers."""
    config = ConvNextConfig(num_stages=2, hidden_sizes=[16, 24], depths=depths, out_features=["stem", "stage1"])
    timms = randomise(ConvNext(config)).eval().freeze()
    features = randomise(ConvNext(config, features_only=True, out_indices=[0, 1])).eval().freeze()
    first = randomise(ConvNext(config, features_only=True, out_indices=[0])).eval().freeze()
    plain, backbone = (randomise(kind(config)).eval().freeze() for kind in (ConvNextModel, ConvNextBackbone))
    x = torch.randn(2, 3, 36, 40)

    def maps():
        last, on_the_way = timms.forward_intermediates(x, norm=True, output_fmt="NHWC")
        yield from (last, *on_the_way, *timms.forward_intermediates(x, [0], stop_early=True, intermediates_only=True))
        yield from (*features(x), *first(x))
        yield from plain(x, output_hidden_states=True).hidden_states
        yield from (*backbone(x).feature_maps, *backbone(x, output_hidden_states=True).hidden_states)

    got = list(maps())
    whole, short = 2 + sum(depths), 1 + depths[0]
    assert chains == [whole, short, whole, short, whole, whole, whole]
    one_by_one()
    assert all(map(torch.equal, got, maps()))
    assert len(chains) == 7
    assert not any(a.data_ptr() == b.data_ptr() for a, b in itertools.combinations(got[3:], 2))


def test_the_input_is_not_overwritten_and_the_result_may_be(model):
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    given = x.clone()
    with torch.no_grad():
        (y,) = outputs_of(WholeRuns(), None, [stages(model)[0]], x)
        (again,) = outputs_of(WholeRuns(), None, [stages(model)[0]], x)
        y += 1
    assert torch.equal(x, given)
    assert torch.equal(y, again + 1)
    assert y.untyped_storage().nbytes() == y.numel() * 4
    y.requires_grad_().sum().backward()


def test_weights_that_move_in_memory(model):
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = output(model, x)
        model.share_memory()
        filler = [torch.full((size,), float("nan")) for size in (16, 24, 32, 48, 64, 96, 128, 192) for _ in range(200)]
        assert torch.equal(output(model, x), expected)
    assert filler


def test_a_sequence_refuses_what_a_block_refuses(model):
    x = torch.randn(1, 3, 32, 32)
    block = blocks_of(model, 0)[1]
    conv = dwconv_of(block)
    plain = conv.weight
    with torch.no_grad():
        output(model, x)
        for bad, error in (
            (plain.double(), "the activations are torch.float32 but dwconv_weight is torch.float64"),
            (plain[..., :4, :4].clone(), "expected a square one of side 3, 5 or 7"),
            (plain.to("meta"), "is on meta"),
        ):
            conv.weight = nn.Parameter(bad, requires_grad=False)
            with pytest.raises((TypeError, ValueError), match=error):
                output(model, x)


def test_a_sequence_refuses_what_other_modules_refuse(model):
    stem = stem_of(model)
    conv, norm = stem.children()
    down_norm, down_conv = downsampling(model)
    with torch.no_grad():
        for layer, name, bad, error in (
            (conv, "weight", conv.weight.double(), "the activations are torch.float32 but weight is torch.float64"),
            (norm, "bias", torch.zeros(17), r"ln_bias has shape \(17,\): expected \(16,\)"),
            (down_conv, "weight", down_conv.weight.double(), "torch.float32 but weight is torch.float64"),
            (down_conv, "bias", down_conv.bias.to("meta"), "is on meta"),
            (down_norm, "bias", torch.zeros(17), r"ln_bias has shape \(17,\): expected \(16,\)"),
        ):
            before = getattr(layer, name)
            setattr(layer, name, nn.Parameter(bad))
            with pytest.raises((TypeError, ValueError), match=error):
                output(model, torch.randn(1, 3, 32, 32))
            setattr(layer, name, before)


def test_an_image_that_a_downsampling_layer_cannot_divide():
    config = ConvNextConfig(num_stages=2, hidden_sizes=[16, 24], depths=[1, 1])
    model = randomise(ConvNext(config)).eval().freeze()
    with torch.no_grad(), pytest.raises(ValueError, match="the image is 1×9: expected at least one patch"):
        model.stages[1](torch.randn(1, 16, 1, 9))


def test_the_stems_live_weights_are_used(model):
    """The stem is not frozen: its weights may change, also in place."""
    x = torch.randn(1, 3, 32, 32)
    conv, norm = stem_of(model).children()
    with torch.no_grad():
        before = output(model, x)
        conv.weight.data.mul_(-1)
        norm.bias.add_(1)
        changed = output(model, x)
        assert not torch.equal(changed, before)
        check(changed, model, x)


def test_an_unknown_activation(model):
    block = blocks_of(model, 0)[1]
    block.act_name = "glue"
    with torch.no_grad(), pytest.raises(ValueError, match="act is 'glue': expected one of gelu"):
        output(model, torch.randn(1, 3, 32, 32))


PARTS = "stem", "block", "downsample"
LIVE_PARTS = [(kind, part, False) for kind in KINDS for part in PARTS] + in_turn(PARTS, True)


@pytest.mark.parametrize(("model", "part", "compile_"), LIVE_PARTS, indirect=["model"])
def test_a_frozen_model_with_a_parameter_that_needs_a_gradient(model, chains, part, compile_):
    module = {"stem": stem_of(model), "block": blocks_of(model, 1)[0], "downsample": downsampling(model)}[part]
    parameter = list(module.parameters())[-1].requires_grad_()
    called = torch.compile(model, backend="aot_eager") if compile_ else model
    y = output(called, torch.randn(1, 3, 32, 32))
    assert WHOLE not in chains
    (y * torch.randn_like(y)).sum().backward()
    assert parameter.grad.abs().sum() > 0


def test_a_module_twice(model):
    """`torch.nn.Module.children` would list it once."""
    blocks = blocks_of(model, 0)
    blocks[2] = blocks[0]
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        check(output(model, x), model, x)


def test_a_stem_in_the_place_of_a_downsampling_layer(chains):
    model = ConvNext(CONFIG)
    model.stages[1].downsample = Stem(16, 24, (2, 2), 1e-6, True)
    randomise(model).eval().freeze()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        check(model(x), model, x)
    assert WHOLE not in chains


def test_gradients_go_block_by_block(model, chains):
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    output(model, x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not chains


# The rest of the model still runs as sequences, stage by stage.
LOOKED_AT = {"stem": [3, 3], "block": [3], "container": [3], "stage": [3, 3], "downsample": [3], "everywhere": []}


@pytest.mark.parametrize("where", LOOKED_AT)
def test_hooks_fire(model, chains, where):
    seen, expected = [], LOOKED_AT[where]
    blocks, stage, timms = blocks_of(model, 0), stages(model)[1], isinstance(model, ConvNext)
    if where == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(lambda module, x, y: seen.append(type(module)))
    else:
        holders = {"stem": stem_of(model), "block": blocks[1], "container": blocks, "stage": stage}
        holder = holders.get(where) or (stage.downsample if timms else stage.downsampling_layer[0])
        handle = holder.register_forward_hook(lambda module, x, y: seen.append(module))
        if where == "container" and not timms:
            holder, expected = None, [WHOLE]  # a ModuleList is not called
    try:
        with torch.no_grad():
            if where == "downsample" and not timms:
                with pytest.warns(RuntimeWarning, match="calls its layers one by one"):
                    output(model, torch.randn(1, 3, 32, 32))
            else:
                output(model, torch.randn(1, 3, 32, 32))
    finally:
        handle.remove()
    if where == "everywhere":
        assert seen.count(type(blocks[0])) == 5
    else:
        assert seen == [holder] * (holder is not None)
    assert chains == expected


def test_calling_the_encoder_alone(chains):
    model = randomise(ConvNextModel(CONFIG)).eval().freeze()
    x, seen = torch.randn(1, 3, 32, 32), []
    handle = model.encoder.register_forward_hook(lambda module, x, y: seen.append(len(y)))
    with torch.no_grad():
        output(model, x)
        assert chains == [3, 3]
        handle.remove()
        model.encoder.forward = lambda x: (x, torch.zeros(1, 24, 3, 3))
        assert not output(model, x).any()
    assert seen == [3]


def test_changes_of_a_block_are_noticed(model, chains):
    x = torch.randn(1, 3, 32, 32)
    block = blocks_of(model, 0)[1]
    with torch.no_grad():
        before = output(model, x)
        block.forward = lambda x: 2 * x
        changed = output(model, x)
        del block.forward
        assert not torch.equal(changed, before)
        unfreeze(block)
        check(output(model, x), model, x)
        freeze(block)
        assert torch.equal(output(model, x), before)
        replaced = nn.LayerNorm(16)
        name = "norm" if isinstance(model, ConvNext) else "layernorm"
        setattr(block, name, replaced)
        replaced.register_forward_hook(lambda *_: None)
        with pytest.warns(RuntimeWarning, match="calls its layers one by one"):
            output(model, x)
    assert chains == [WHOLE, 3, 3, WHOLE, 3]


def test_a_dispatch_mode_sees_the_blocks(model, chains):
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


def test_shapes_that_no_kernel_supports(chains):
    model = randomise(ConvNext(ConvNextConfig(num_stages=1, hidden_sizes=[12], depths=[2]))).eval().freeze()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        check(model(x), model, x)
        check(torch.compile(model, fullgraph=True)(x), model, x)
        maps = model.forward_intermediates(x, intermediates_only=True)
        compiled_maps = torch.compile(model.forward_intermediates)(x, intermediates_only=True)
        assert all(map(torch.equal, compiled_maps, maps))
    assert not chains
