"""The registered operators: opcheck, Inductor, `torch.func`, and what they save for backward."""

from __future__ import annotations

import importlib

import pytest
import torch
from block_cases import activations, block_parameters
from convnext_fast.kernels.dwconv import gluon
from convnext_fast.kernels.targets import planned_for
from operator_cases import KERNELS_ALONE, ON_CPU, WITHOUT_GRADIENT, cases, registered
from support import BOUNDS, randomise, relative_error
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from convnext_fast import ConvNext, ConvNextConfig, ops
from convnext_fast.backends import reference
from convnext_fast.ops.signatures import SIGNATURES


def test_every_registered_operator_is_checked():
    """Here or, with the kernels, in kernels/machine_code: test_operators_executed.py, and dwconv in its own file.

    Those of sequence_operator.py in test_sequence_operator.py and in the interpreter's test_model_interpreted.py, those
    of block_group_operator.py in the interpreter's test_live_sequence.py.
    """
    for module in ("backends.dwconv", "ops.sequence_operator", "ops.block_group_operator"):
        importlib.import_module(f"convnext_fast.{module}")
    elsewhere = (
        "dwconv",
        "dwconv_wgrad_sums",
        "frozen_steps",
        "live_steps",
        "blocks_fwd",
        "blocks_fwd_gpu",
        "blocks_bwd",
        "blocks_bwd_gpu",
    )
    compiled = {f"{name}_cpu" for name in ON_CPU} | {f"{name}_gpu" for name in SIGNATURES}
    assert registered() == {*ON_CPU, *KERNELS_ALONE, *elsewhere, *compiled}


@pytest.mark.skipif(not gluon.AVAILABLE, reason="the other form cuts the rows by the number of images")
@pytest.mark.parametrize("channels", [96, 384])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_any_number_of_images_is_one_program_on_a_gpu(target, channels):
    """No tile size is computed from a symbolic number: that would add a guard and a reason to compile again."""
    environment = ShapeEnv()
    symbol = environment.create_symbol(8, source=ConstantSource("images"), dynamic_dim=DimDynamic.DYNAMIC)
    images = environment.create_symintnode(symbol, hint=8)

    def imagined(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda")

    with planned_for(target), FakeTensorMode(shape_env=environment):
        x, vector, hidden = imagined(images, 14, 14, channels), imagined(channels), imagined(4 * channels)
        w1, w2 = imagined(4 * channels, channels), imagined(channels, 4 * channels)
        block = imagined(channels, 1, 7, 7), vector, vector, vector, w1, hidden, w2, vector, vector
        y, *_ = torch.ops.convnext_fast.block_fwd(x, *block, None, None, None, 1e-6, "gelu", 1, x.dtype)
        patches = vector, vector, imagined(2 * channels, channels, 2, 2), imagined(2 * channels)
        z = torch.ops.convnext_fast.downsample_fwd(y, *patches, 1e-6, x.dtype)
    assert (z.shape[1:], z.device.type) == ((7, 7, 2 * channels), "cuda")
    assert not environment.guards


@pytest.mark.parametrize("name", ON_CPU)
def test_opcheck(name):
    for arguments in cases(name, torch.float32):
        every = {} if name.endswith("_fwd") else {"test_utils": WITHOUT_GRADIENT}
        torch.library.opcheck(getattr(torch.ops.convnext_fast, name), arguments, **every)
        whole = getattr(torch.ops.convnext_fast, f"{name}_cpu")
        torch.library.opcheck(whole, arguments, test_utils=WITHOUT_GRADIENT)


def tiny(**options):
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[1, 2], num_labels=5)
    return randomise(ConvNext(config, **options))


def test_compiles_under_inductor():
    model = tiny().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) <= BOUNDS[torch.float32]


def test_transforms_of_torch_func():
    """They transform the plain reference: the values are the same as without them."""
    torch.manual_seed(0)
    parameters = {name: p.detach() for name, p in block_parameters(6, 24, 7, torch.float64).items()}
    x, v = torch.randn(2, 3, 2, 5, 4, 6, dtype=torch.float64)
    bound = BOUNDS[torch.float64]

    def block(t, p=parameters):
        return ops.convnext_block(t, **p)

    def energy(t, p=parameters):
        return block(t, p).square().sum()

    singles = [t.clone().requires_grad_() for t in x]
    leaves = [p.clone().requires_grad_() for p in parameters.values()]
    outputs = [block(t, dict(zip(parameters, leaves, strict=True))) for t in singles]
    assert relative_error(torch.func.vmap(block)(x), torch.stack(outputs)) <= bound
    expected = torch.autograd.grad(sum(y.square().sum() for y in outputs), [*singles, *leaves])
    gradient = torch.func.vmap(torch.func.grad(energy))(x)
    assert relative_error(gradient, torch.stack(expected[:3])) <= bound
    # A gradient of the parameters for each sample, as differential privacy needs it.
    each = torch.func.vmap(torch.func.grad(energy, argnums=1), in_dims=(0, None))(x, parameters)
    for name, value in zip(parameters, expected[3:], strict=True):
        assert relative_error(each[name].sum(0), value) <= bound, name
    _, tangent = torch.func.jvp(energy, (x[0],), (v[0],))
    assert relative_error(tangent, (gradient[0] * v[0]).sum()) <= bound
    _, pullback = torch.func.vjp(block, x[0])
    assert relative_error(pullback(2 * outputs[0].detach())[0], gradient[0]) <= bound
    second = torch.func.jvp(torch.func.grad(energy), (x[0],), (v[0],))[1]
    step = 1e-5
    difference = (torch.func.grad(energy)(x[0] + step * v[0]) - torch.func.grad(energy)(x[0] - step * v[0])) / 2 / step
    assert relative_error(second, difference) <= 1e-7


def operands(name, members=3):
    """Tensors of a public op in float64, each for ``members`` calls at once."""

    def normal(*shape):
        return torch.randn(members, *shape, dtype=torch.float64)

    x, w1, w2, gamma = normal(2, 5, 4, 6), normal(24, 6), normal(6, 24), normal(6)
    affine, dwconv = (normal(6), normal(6)), (normal(6, 1, 7, 7), normal(6))
    mlp = (w1, normal(24), w2, normal(6))
    return {
        "convnext_block": (x, *dwconv, *affine, *mlp, gamma),
        "convnext_v2_block": (x, *dwconv, *affine, w1, *(normal(24) for _ in range(3)), *mlp[2:]),
        "downsample": (x, *affine, normal(9, 6, 2, 2), normal(9)),
        "dwconv_layernorm": (x, *dwconv, *affine),
        "frozen_block": (x, *dwconv, w1, normal(2, 24), *mlp[2:]),
        "frozen_downsample": (x, normal(9, 6, 2, 2), normal(9)),
        "global_response_norm": (x, normal(6), normal(6)),
        "patchify_stem": (normal(2, 3, 8, 9), normal(6, 3, 4, 4), normal(6), *affine),
        "pointwise_mlp": (x, torch.randn_like(x), *mlp, gamma),
    }[name]


@pytest.mark.parametrize("name", ops.__all__)
def test_torch_func_takes_every_public_op(name):
    """vmap over all operands at once and over the activations alone, and grad for each operand: as in single calls."""
    torch.manual_seed(0)
    op, tensors = getattr(ops, name), operands(name)

    def energy(*operands):
        return op(*operands).square().sum()

    everything, bound = tuple(range(len(tensors))), BOUNDS[torch.float64]
    single = [[t[i].clone().requires_grad_() for t in tensors] for i in range(3)]
    outputs = [op(*leaves) for leaves in single]
    assert relative_error(torch.func.vmap(op)(*tensors), torch.stack(outputs)) <= bound
    shared = (0, *(None for _ in tensors[1:]))
    mapped = torch.func.vmap(op, in_dims=shared)(tensors[0], *single[0][1:])
    assert relative_error(mapped[1], op(single[1][0], *single[0][1:])) <= bound
    expected = [torch.autograd.grad(y.square().sum(), leaves) for y, leaves in zip(outputs, single, strict=True)]
    found = torch.func.grad(energy, argnums=everything)(*(t[0] for t in tensors))
    of_each = torch.func.vmap(torch.func.grad(energy, argnums=everything))(*tensors)
    for i in everything:
        assert relative_error(found[i], expected[0][i]) <= bound, i
        assert relative_error(of_each[i], torch.stack([gradient[i] for gradient in expected])) <= bound, i


@pytest.mark.parametrize(
    "op",
    [
        lambda x, p: ops.convnext_block(x, **p),
        lambda x, p: ops.dwconv_layernorm(x, *list(p.values())[:4]),
        lambda x, p: ops.pointwise_mlp(x, x, *list(p.values())[4:]),
    ],
    ids=["convnext_block", "dwconv_layernorm", "pointwise_mlp"],
)
def test_a_second_derivative_is_refused_with_a_clear_error(op):
    x = activations((2, 5, 4, 6), torch.float32, "contiguous")
    parameters = block_parameters(6, 24, 7, torch.float32)
    (gradient,) = torch.autograd.grad(op(x, parameters).square().sum(), x, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"no second derivatives: take plain PyTorch \(fused=False .* unfuse\(model\)"
    ):
        gradient.sum().backward()


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_saved_bytes(recompute):
    """x, and by level the normalised activations, their statistics, and the hidden activations; nothing else."""
    x = activations((2, 5, 4, 6), torch.float32, "contiguous")
    parameters = block_parameters(6, 24, 7, torch.float32)
    pointers = {p.data_ptr() for p in parameters.values()}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in pointers:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.convnext_block(x, **parameters, recompute=recompute)
    pixels = 2 * 5 * 4
    assert sum(saved) == pixels * (6 + [6 + 24, 6, 0][recompute])


def test_deterministic():
    parameters = block_parameters(16, 64, 7, torch.float32)
    x = activations((4, 9, 9, 16), torch.float32, "contiguous")
    cotangent = torch.randn(x.shape)
    leaves = [x, *parameters.values()]
    runs = [torch.autograd.grad(ops.convnext_block(x, **parameters), leaves, cotangent) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class NoGradient(torch.autograd.Function):
    """Passes a tensor on, and no gradient back."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, _):
        return None


@pytest.mark.parametrize("name", ["convnext_block", "dwconv_layernorm", "pointwise_mlp"])
def test_a_result_without_gradient_gives_none(name):
    parameters = block_parameters(8, 24, 7, torch.float32)
    x = activations((2, 5, 4, 8), torch.float32, "contiguous").requires_grad_()
    full = list(parameters.values())
    arguments = {"convnext_block": full, "dwconv_layernorm": full[:4], "pointwise_mlp": [x, *full[4:]]}[name]
    y = getattr(ops, name)(x, *arguments)
    NoGradient.apply(y).sum().backward()
    assert x.grad is None
    assert all(parameter.grad is None for parameter in full)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_mlp_in_bfloat16_with_a_wider_layer_scale(compiled):
    parameters = [p.detach().bfloat16() for p in list(block_parameters(8, 24, 7, torch.float32).values())[4:8]]
    gamma = torch.randn(8)
    x = activations((2, 5, 4, 8), torch.bfloat16, "contiguous")
    run = torch.compile(ops.pointwise_mlp, fullgraph=True) if compiled else ops.pointwise_mlp
    y = run(x, None, *parameters, gamma)
    exact = reference.pointwise_mlp(x, None, *parameters, gamma, None, "gelu", dtype=torch.float64)
    assert y.dtype == reference.pointwise_mlp(x, None, *parameters, gamma, None, "gelu").dtype == torch.float32
    assert relative_error(y, exact) <= 0.02
