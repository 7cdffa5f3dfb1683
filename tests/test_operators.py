"""The registered operators: opcheck, tracing, export, compilation, and what they save for backward."""

from __future__ import annotations

import pytest
import torch
from support import BOUNDS, gradients, randomise, relative_error
from test_block_parity import activations, block_parameters

from convnext_fast import ConvNext, ConvNextConfig, operators, ops


def block_arguments(recompute, dtype=torch.float32):
    parameters = block_parameters(6, 24, 7, dtype)
    x = activations((2, 5, 4, 6), dtype, "contiguous")
    return (x, *parameters.values(), torch.tensor([0.0, 1.25]), 1e-6, "gelu", recompute, dtype)


def test_opcheck():
    x, *parameters = block_arguments(0)[:10]
    scale = torch.tensor([0.0, 1.25])
    for recompute in (0, 1, 2):
        torch.library.opcheck(operators.block_fwd, block_arguments(recompute))
    torch.library.opcheck(operators.dwconv_layernorm_fwd, (x, *parameters[:4], 1e-6, torch.float32))
    torch.library.opcheck(
        operators.pointwise_mlp_fwd, (x, x.detach().clone(), *parameters[4:], scale, "silu", 0, torch.float32)
    )


def tiny(**options):
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[1, 2], num_labels=5)
    return randomise(ConvNext(config, **options))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole_with_any_size(training):
    """One graph, no recompilation when batch and resolution change, the same results and gradients."""
    torch.compiler.reset()
    model = tiny(dtype=torch.float64).train(training)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(4, 3, 32, 56, dtype=torch.float64))
    for size in [(2, 3, 32, 40), (3, 3, 48, 32), (5, 3, 40, 64)]:
        x = torch.randn(*size, dtype=torch.float64)
        expected = model(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            actual = compiled(x)
        assert relative_error(actual, expected) <= BOUNDS[torch.float64]
        if training:
            want, got = gradients(model, [expected], []), gradients(model, [actual], [])
            assert all(relative_error(got[k], v) <= BOUNDS[torch.float64] for k, v in want.items())


def test_compiles_under_inductor():
    torch.compiler.reset()
    model = tiny().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) <= BOUNDS[torch.float32]


def test_exports_with_dynamic_sizes():
    model = tiny().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 32, 32)
    assert relative_error(program.module()(x), model(x)) <= BOUNDS[torch.float32]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_maps():
    parameters = block_parameters(6, 24, 7, torch.float32)
    x = torch.randn(3, 2, 5, 4, 6)
    mapped = torch.func.vmap(lambda t: ops.convnext_block(t, **parameters))(x)
    assert torch.equal(mapped, torch.stack([ops.convnext_block(t, **parameters) for t in x]))


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
    assert sum(saved) == pixels * (6 + [6 + 1 + 24, 6 + 1, 0][recompute])


def test_deterministic():
    parameters = block_parameters(16, 64, 7, torch.float32)
    x = activations((4, 9, 9, 16), torch.float32, "contiguous")
    cotangent = torch.randn(x.shape)
    leaves = [x, *parameters.values()]
    runs = [torch.autograd.grad(ops.convnext_block(x, **parameters), leaves, cotangent) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
