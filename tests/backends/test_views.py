"""Arguments that are views of another kind: negative, zero-stride, overlapping, conjugate.

A kernel reads memory, where such a tensor's numbers do not lie as its shape says. Every argument of every op, and the
gradient that comes back, is such a view here; the numbers have to be those of a plain copy.
"""

from __future__ import annotations

import pytest
import torch
from block_cases import block_parameters, v2_parameters
from support import FLOAT32_BOUND, relative_error

from convnext_fast import ConvNext, ConvNextConfig, ops
from convnext_fast.ops.folding import freeze_block, freeze_downsample

CHANNELS, HIDDEN, SHAPE = 16, 64, (2, 9, 10, 16)


@pytest.fixture(autouse=True)
def one_thread():
    """How threads share the work is of no matter here, and starting them takes longer than these small sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def negative(values):
    """−values, in memory: the numbers without their sign."""
    return torch._neg_view(values.neg())


def negative_with_gaps(values):
    return torch.complex(torch.zeros_like(values), values.neg()).conj().imag


def repeated(values):
    """The first row again and again, in no more memory."""
    return values[:1].expand(values.shape)


def overlapping(values):
    """Each row begins one number after the row before."""
    return values.flatten().as_strided(values.shape, (1,) * values.dim())


VIEWS = [negative, negative_with_gaps, repeated, overlapping]


def arguments_of(name):
    """(function, its tensors by name) of an op."""
    torch.manual_seed(0)
    draw = torch.randn
    parameters = {k: v.detach() for k, v in block_parameters(CHANNELS, HIDDEN, 7, torch.float32).items()}
    dwconv = {"weight": parameters["dwconv_weight"], "bias": parameters["dwconv_bias"]}
    affine = {"ln_weight": parameters["ln_weight"], "ln_bias": parameters["ln_bias"]}
    x, drop_scale = draw(SHAPE), torch.tensor([1.25, 0.5])
    v2 = {k: v.detach() for k, v in v2_parameters(CHANNELS, HIDDEN, 7, torch.float32).items()}
    if name.startswith("v2 block"):
        level = int(name[-1])
        return (lambda **t: ops.convnext_v2_block(**t, recompute=level)), {"x": x, **v2, "drop_scale": drop_scale}
    if name.startswith("block"):
        level = int(name[-1])
        return (lambda **t: ops.convnext_block(**t, recompute=level)), {"x": x, **parameters, "drop_scale": drop_scale}
    if name == "dwconv_layernorm":
        return ops.dwconv_layernorm, {"x": x, **dwconv, **affine}
    if name == "pointwise_mlp":
        mlp = {k: parameters[k] for k in ("w1", "b1", "w2", "b2", "gamma")}
        return ops.pointwise_mlp, {"x": x, "residual": draw(SHAPE), **mlp, "drop_scale": drop_scale}
    if name == "stem":
        patches = {"weight": draw(CHANNELS, 4, 4, 4) / 8, "bias": draw(CHANNELS)}
        return ops.patchify_stem, {"image": draw(2, 4, 17, 16), **patches, **affine}
    patches = {"weight": draw(24, CHANNELS, 2, 2) / 8, "bias": draw(24)}
    if name == "downsample":
        return ops.downsample, {"x": x, **affine, **patches}
    if name == "frozen_downsample":
        return ops.frozen_downsample, {"x": x, **freeze_downsample(**affine, **patches)._asdict()}
    folded = freeze_block(**v2, gamma=None) if name == "frozen v2 block" else freeze_block(**parameters)
    return ops.frozen_block, {"x": x, **{k: t for k, t in folded._asdict().items() if t is not None}}


TRAINED = [
    "block 0",
    "block 1",
    "block 2",
    "v2 block 0",
    "v2 block 2",
    "dwconv_layernorm",
    "pointwise_mlp",
    "stem",
    "downsample",
]
FROZEN = ["frozen_block", "frozen v2 block", "frozen_downsample"]


def changes_of(tensors):
    """(view, the names of what becomes one): each argument alone where sign is lost, all together otherwise."""
    return [*((negative, [name]) for name in tensors), *((view, list(tensors)) for view in VIEWS)]


@pytest.mark.parametrize("op", [*TRAINED, *FROZEN])
@torch.no_grad()
def test_values(op):
    function, tensors = arguments_of(op)
    for view, names in changes_of(tensors):
        seen = {name: view(tensors[name]) for name in names}
        copies = {name: tensor.clone() for name, tensor in seen.items()}
        error = relative_error(function(**tensors | seen), function(**tensors | copies))
        assert error <= FLOAT32_BOUND, (view, names)


@pytest.mark.parametrize("op", TRAINED)
def test_gradients(op):
    function, tensors = arguments_of(op)

    def of(change, names, view):
        leaves = {k: t.clone().requires_grad_(k != "drop_scale") for k, t in tensors.items()}
        y = function(**leaves | {name: change(view(leaves[name])) for name in names})
        torch.manual_seed(1)
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return y.detach(), *torch.autograd.grad(y, wanted, torch.randn_like(y))

    for view, names in changes_of(tensors):
        found, expected = of(lambda seen: seen, names, view), of(torch.clone, names, view)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other, least=1e-3) <= FLOAT32_BOUND, (view, names)


@pytest.mark.parametrize("op", TRAINED)
def test_cotangents(op):
    function, tensors = arguments_of(op)

    def of(change):
        leaves = [t.clone().requires_grad_(k != "drop_scale") for k, t in tensors.items()]
        y = function(**dict(zip(tensors, leaves, strict=True)))
        torch.manual_seed(1)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return torch.autograd.grad(y, wanted, change(torch.randn_like(y)))

    for view in VIEWS:
        for one, other in zip(of(view), of(lambda dy, view=view: view(dy).clone()), strict=True):
            assert relative_error(one, other) <= FLOAT32_BOUND, view


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("frozen", [False, True])
def test_models(view, frozen):
    torch.manual_seed(0)
    config = ConvNextConfig(num_stages=2, depths=(1, 1), hidden_sizes=(16, 24), image_size=32, num_labels=3)
    model, plain = (ConvNext(config).eval().requires_grad_(False) for _ in range(2))
    for (name, parameter), other in zip(list(model.named_parameters()), plain.parameters(), strict=True):
        owner, _, last = name.rpartition(".")
        seen = view(torch.randn(parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(seen, requires_grad=False))
        other.copy_(seen)
    if frozen:
        model.freeze(), plain.freeze()
    images = torch.randn(2, 3, 33, 32)
    with torch.no_grad():
        assert relative_error(model(images), plain(images)) <= FLOAT32_BOUND
        assert relative_error(model(view(images)), plain(view(images).clone())) <= FLOAT32_BOUND


def test_complex_numbers_are_refused():
    frozen = arguments_of("frozen_block")[1]
    with pytest.raises(TypeError, match="expected a floating dtype"):
        ops.frozen_block(**{**frozen, "x": torch.randn(SHAPE, dtype=torch.complex64).conj()})
