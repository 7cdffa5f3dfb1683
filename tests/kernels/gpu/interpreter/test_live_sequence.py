"""Unfrozen models that run without calling their modules: the same bits, and the reasons to call the modules."""

import itertools
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

from convnext_fast import ConvNext, ConvNextConfig
from convnext_fast.backends import environment
from convnext_fast.backends.steps import WEIGHTS, Step
from convnext_fast.models import fused_module, switches, whole_runs
from convnext_fast.models.whole_runs import outputs_of, steps_of
from convnext_fast.ops import block_group, block_group_operator, live_sequence

DEEP = ConvNextConfig(num_stages=2, hidden_sizes=[8, 8], depths=[1, 2], num_labels=3, drop_path_rate=0.3)


@pytest.fixture(autouse=True)
def runs(monkeypatch):
    """Whether each search for a whole run found one."""
    found = []

    def watched(*arguments):
        results = outputs_of(*arguments)
        found.append(results is not None)
        return results

    monkeypatch.setattr(environment, "REQUEST", "triton")
    for module in (switches, fused_module):
        monkeypatch.setattr(module, "outputs_of", watched)
    return found


@pytest.fixture
def by_modules(monkeypatch):
    """``by_modules(function)``: its result with every module called."""

    def call(function):
        with monkeypatch.context() as patch:
            for module in (switches, fused_module):
                patch.setattr(module, "outputs_of", lambda *arguments: None)
            return function()

    return call


@pytest.fixture(params=[block_group, block_group_operator], ids=["node", "operator"])
def _groups(request, monkeypatch):
    """Consecutive blocks as an autograd node, or as the operator that a compiler gets."""
    monkeypatch.setattr(block_group, "run", request.param.run)


@torch.no_grad()
def deep(**options):
    torch.manual_seed(1)
    model = ConvNext(DEEP, **options)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape)
        parameter.copy_(values / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else values)
    return model


def step(model, x, autocast=None):
    """The logits and every gradient, for one draw of drop path and of the output's gradient."""
    torch.manual_seed(3)
    wanted = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [*wanted, *([x] * x.requires_grad)], torch.randn_like(y))]


def nodes_of(y):
    """The names of all nodes of the graph behind y."""
    names, nodes = [], [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    return names


def assert_same(results, expected):
    assert len(results) == len(expected)
    assert all(itertools.starmap(torch.equal, zip(results, expected, strict=True)))


@pytest.mark.usefixtures("_groups")
@pytest.mark.parametrize(("recompute", "training"), [(0, True), (1, False), (2, True)])
def test_a_training_step_has_the_bits_of_one_by_modules(runs, by_modules, recompute, training):
    model, x = deep().train(training), torch.randn(2, 3, 8, 16, requires_grad=True)
    model.recompute = recompute
    expected = by_modules(lambda: step(model, x))
    assert_same(step(model, x), expected)
    assert runs == [True]


@pytest.mark.usefixtures("_groups")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast(runs, by_modules, dtype):
    model, x = deep().train(), torch.randn(2, 3, 8, 16, dtype=dtype)
    expected = by_modules(lambda: step(model, x, torch.float16))
    assert_same(step(model, x, torch.float16), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        model.eval()
        assert torch.equal(model(x), by_modules(lambda: model(x)))
        model.freeze()  # folded weights have another dtype than autocast's
        assert torch.equal(model(x), by_modules(lambda: model.unfreeze()(x)))
    assert runs == [True, True, True]


@pytest.mark.usefixtures("_groups")
def test_parts_that_take_no_gradient(runs, by_modules):
    """Some weights of some blocks, everything before a block, and everything but the head."""
    model, x = deep().train(), torch.randn(1, 3, 8, 8)
    blocks = model.stages[1].blocks
    for frozen in (
        [blocks[0].conv_dw, blocks[1].mlp],
        [model.stem, model.stages[0], model.stages[1].downsample, blocks[0]],
        [model.stem, model.stages],
    ):
        model.requires_grad_(True)
        for part in frozen:
            part.requires_grad_(False)
        assert_same(step(model, x), by_modules(lambda: step(model, x)))
    assert runs == [True] * 3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inference_is_one_plan(runs, by_modules, monkeypatch, dtype):
    from convnext_fast.backends import gpu

    calls, steps = [], gpu.steps
    monkeypatch.setattr(gpu, "steps", lambda x, given, *rest: calls.append(len(given)) or steps(x, given, *rest))
    model, x = deep().to(dtype).eval(), torch.randn(2, 3, 12, 9).to(dtype)
    logits, (last, maps) = by_modules(lambda: (model(x), model.forward_intermediates(x)))
    assert torch.equal(model(x), logits)
    again, others = model.forward_intermediates(x)
    assert_same([again, *others], [last, *maps])
    assert calls == [5, 5]
    assert runs == [True, True]


def test_blocks_share_nodes_of_the_graph():
    model = deep().train()
    names = nodes_of(model(torch.randn(1, 3, 8, 8)))
    assert sum("_Blocks" in name for name in names) == 2  # one for each stage


def test_groups_end_where_an_output_is_wanted(monkeypatch):
    monkeypatch.setattr(block_group, "MOST", 3)
    block, other = (Step(kind, WEIGHTS[kind](*[None] * len(WEIGHTS[kind]._fields)), 0.0) for kind in (2, 1))
    steps = [other, *[block._replace(eps=float(i)) for i in range(5)], other, block]
    for ends, expected in (([7], [1, 3, 2, 1, 1]), ([1, 3, 7], [1, 1, 2, 2, 1, 1])):
        groups = live_sequence._groups_to(steps, ends)
        assert [each for group in groups for each in group] == steps
        assert list(map(len, groups)) == expected


def test_feature_maps_on_the_way_take_gradients(runs, by_modules):
    model, x = deep().train(), torch.randn(1, 3, 8, 8)

    def gradients():
        torch.manual_seed(2)
        maps = model.forward_intermediates(x, intermediates_only=True)
        return torch.autograd.grad(sum(m.square().sum() for m in maps), list(model.stages.parameters()))

    assert_same(gradients(), by_modules(gradients))
    assert runs == [True]
    first, last = model.forward_intermediates(x, intermediates_only=True)
    (gradient,) = torch.autograd.grad(last.sum(), first, retain_graph=True)
    first.retain_grad()
    last.sum().backward()
    assert gradient.abs().max() > 0
    assert torch.equal(first.grad, gradient)


def test_changes_are_noticed(runs, by_modules):
    model, x = deep().eval(), torch.randn(1, 3, 8, 8)
    block = model.stages[1].blocks[1]

    def forward():
        torch.manual_seed(3)
        with torch.no_grad():
            return model(x)

    def check(*expected_runs):
        runs.clear()
        assert torch.equal(forward(), by_modules(forward))
        assert tuple(runs) == expected_runs
        forward()  # the result of a search lasts until the next call

    check(True)
    with torch.no_grad():
        block.mlp.fc1.weight.mul_(2)
    check(True)
    block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight.detach().clone())
    check(True)
    block.norm.eps = 0.1
    check(True)
    block.drop_path.rate = 0.9
    model.train()
    check(True)
    block.gamma.data = block.gamma.data.clone()
    check(True)
    block.register_forward_hook(lambda module, args, output: 2 * output)
    check(False, True, False)  # the whole, the first stage, the second


@pytest.mark.parametrize("after_a_run", [False, True])
def test_checkpointing_calls_the_blocks(runs, after_a_run):
    model = deep().train()
    if after_a_run:
        for stage in model.stages:
            stage.register_forward_hook(lambda *_: None)  # each stage searches for itself
        model(torch.randn(1, 3, 8, 8))
        runs.clear()
    model.set_grad_checkpointing()
    names = nodes_of(model(torch.randn(1, 3, 8, 8)))
    assert True not in runs
    assert not any("_Blocks" in name for name in names)


def test_a_hook_in_a_new_dictionary_is_called(runs):
    """Recipes that remove all hooks leave a new dictionary."""
    model, x, calls = deep().eval(), torch.randn(1, 3, 8, 8), []
    for module in (model.stages[0].blocks[0], model.stages[1].blocks[0].norm):
        model(x)
        module._forward_hooks = OrderedDict()
        model(x)
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(x)
        handle.remove()
    assert calls == [1, 1]


def test_a_stem_under_autocast_is_not_in_a_plan(monkeypatch):
    """On a GPU its result has another dtype."""
    model = deep().half().eval()
    sequence = live_sequence.LiveSequence(steps_of(nn.Sequential(model.stem, model.stages), frozen=False))
    x = torch.randn(1, 3, 8, 8).half()
    with torch.no_grad():
        sequence(x, [4])
        assert sequence._is_one_plan(x, torch.float16)
        with torch.autocast("cpu", torch.float16):
            assert not sequence._is_one_plan(x, torch.float16)


def test_a_layer_scale_in_float64_is_refused():
    model = deep().eval()
    model.stages[1].blocks[0].gamma.data = model.stages[1].blocks[0].gamma.data.double()
    with torch.autocast("cpu", torch.float16), pytest.raises(TypeError, match="float64"):
        model(torch.randn(1, 3, 8, 8))


def test_a_layer_that_does_more_is_called(runs):
    model, x = deep().eval(), torch.randn(1, 3, 8, 8)
    calls = []
    model.stages[1].blocks[1].norm.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(RuntimeWarning, match="hooks on norm"):
        model(x)
    assert calls == [1]


def test_failed_searches_for_a_run_become_rare(monkeypatch):
    model, x = deep().eval(), torch.randn(1, 3, 8, 8)
    model.stages[1].blocks[1].register_forward_hook(lambda *_: None)
    looks, find = [], whole_runs._steps_of_parts
    monkeypatch.setattr(whole_runs, "_steps_of_parts", lambda *a: looks.append(a[1]) or find(*a))
    with torch.no_grad():
        for _ in range(16):
            model(x)
    assert looks.count(None) == 5  # of the whole model: at calls 1, 2, 4, 8 and 16


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda block: setattr(block.mlp.fc1.weight, "data", block.mlp.fc1.weight.data[:3]), ValueError),
        (lambda block: setattr(block.conv_dw.weight, "data", block.conv_dw.weight.data.double()), TypeError),
        (lambda block: setattr(block.norm.weight, "data", block.norm.weight.data[:7]), ValueError),
    ],
)
def test_weights_that_became_wrong_are_refused(change, error):
    model, x = deep().eval(), torch.randn(1, 3, 8, 8)
    model(x)
    change(model.stages[1].blocks[1])
    with pytest.raises(error, match=r"expected|convert"):
        model(x)


def test_weights_that_are_negative_views(runs, by_modules):
    model, x = deep().eval(), torch.randn(1, 3, 8, 8)
    bias = model.stages[1].blocks[0].mlp.fc1.bias
    bias.data = torch._neg_view(bias.data)
    with torch.no_grad():
        assert torch.equal(model(x), by_modules(lambda: model(x)))


def test_a_second_derivative_is_refused():
    model, x = deep().eval(), torch.randn(1, 3, 8, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


def test_saved_tensors_pass_through_hooks(by_modules):
    model, x = deep().train(), torch.randn(1, 3, 8, 8)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t.clone(), lambda t: t):
        results = step(model, x)
    assert packed
    assert_same(results, by_modules(lambda: step(model, x)))
