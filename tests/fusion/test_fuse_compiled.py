"""Fused models of transformers in PyTorch's compilers and exporters."""

from __future__ import annotations

import warnings

import pytest
import torch
from fuse_support import Logits, everything, fused_calls, one_thread  # noqa: F401
from support import FLOAT32_BOUND, relative_error
from test_fuse import tiny

from convnext_fast import fuse


@pytest.fixture
def image():
    return torch.randn(3, 3, 32, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_compiles_as_one_graph(training, image):
    model = Logits(tiny(drop_path_rate=0.0)).train(training)
    expected = everything(model, image)
    compiled = torch.compile(fuse(model).model, fullgraph=True, backend="aot_eager")
    for name, value in everything(compiled, image).items():
        assert relative_error(value, expected[name.removeprefix("_orig_mod.")]) <= FLOAT32_BOUND, name
    report = torch.compile(fuse(model), fullgraph=True, backend="aot_eager")
    assert relative_error(report(image), model(image)) <= FLOAT32_BOUND


def block_of(model):
    return model.model.convnext.encoder.stages[1].layers[0]


def dilate(block):
    block.dwconv.dilation, block.dwconv.padding = (2, 2), (6, 6)


def replace_the_activation(block):
    block.act = torch.nn.ReLU()


def replace_the_norm(block):
    block.layernorm = type("OtherNorm", (torch.nn.LayerNorm,), {})(12)


def remove_the_layer_scale(block):
    block.layer_scale_parameter = None


@pytest.mark.filterwarnings("ignore:a fused")
def test_a_compiled_model_notices_changed_layers(image):
    model = Logits(tiny()).eval()
    compiled = torch.compile(fuse(model).model, fullgraph=True, backend="aot_eager")
    before = compiled(image)
    for change in (dilate, replace_the_activation, replace_the_norm, remove_the_layer_scale):
        change(block_of(model))
        after = compiled(image)
        assert relative_error(after, before) > 1e-3, change
        assert relative_error(after, model(image)) <= FLOAT32_BOUND, change
        before = after


@pytest.mark.filterwarnings("ignore:a fused")
@pytest.mark.parametrize("frozen", [True, False])
def test_a_compiled_model_notices_a_longer_downsampling_layer(frozen, image):
    model = Logits(tiny()).eval()
    fused = fuse(model)
    compiled = torch.compile(fused.freeze() if frozen else fused.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        before = compiled(image)
        layers = (m for m in model.modules() if getattr(m, "downsampling_layer", None))
        next(m.downsampling_layer for m in layers).append(torch.nn.ReLU())
        after = compiled(image)
        assert relative_error(after, before) > 1e-3
        assert relative_error(after, model(image)) <= FLOAT32_BOUND


@pytest.mark.filterwarnings("ignore:a fused")
@pytest.mark.parametrize("layer", ["dwconv", "act"])
def test_hooks_inside_a_block_are_compiled(layer, image):
    model = Logits(tiny()).eval()
    compiled = torch.compile(fuse(model).model, fullgraph=True, backend="aot_eager")
    without = model(image)
    getattr(block_of(model), layer).register_forward_hook(lambda module, inputs, y: y.square())
    after = compiled(image)
    assert relative_error(after, without) > 1e-3
    assert relative_error(after, model(image)) <= FLOAT32_BOUND


MORE = 3
"""Blocks that the larger of two models has in addition, so that what a model has once does not count."""


def guards_of_a_block(prepare):
    """How many guards a compiled model has for each block, after ``prepare``."""
    x, counts = torch.randn(2, 3, 32, 40), []
    for depth in (1, 1 + MORE):
        torch.compiler.reset()
        model = tiny(depths=[1, depth]).eval()
        prepare(model)
        with torch.no_grad():
            counts.append(len(torch._dynamo.explain(model)(x).out_guards))
    return (counts[1] - counts[0]) / MORE


def test_a_fused_block_has_hardly_more_guards_than_the_hosts_own():
    """They are checked before each call, which takes the host longer than some kernels take a GPU."""
    # PyTorch 2.9 sets more of them, 1.8 times as many as for the library's own block.
    most = (2 if torch.__version__ < "2.10" else 1.4) * guards_of_a_block(lambda model: None)
    assert guards_of_a_block(fuse) <= most
    assert guards_of_a_block(lambda model: fuse(model).freeze()) <= most


def exported(image):
    """(the program of a fused model with a dynamic batch, that model, its output before it was fused)."""
    model = Logits(tiny()).eval()
    expected = model(image)
    fuse(model)
    batch = torch.export.Dim("batch", min=1, max=16)
    return torch.export.export(model, (image,), dynamic_shapes=({0: batch},)), model, expected


@pytest.mark.thorough
def test_packages_ahead_of_time(image, tmp_path):
    """AOTInductor, most of whose time a C++ compiler takes."""
    program, _, expected = exported(image)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert relative_error(torch._inductor.aoti_load_package(package)(image), expected) <= FLOAT32_BOUND


def test_exports_and_traces(image):
    """`torch.export` with a dynamic batch, `torch.jit.trace`, `torch.fx`."""
    program, model, expected = exported(image)
    assert relative_error(program.module()(image), expected) <= FLOAT32_BOUND
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (image,))
    assert "convnext_fast::" not in str(traced.inlined_graph)
    assert relative_error(traced(image), expected) <= FLOAT32_BOUND
    stage = model.model.convnext.encoder.stages[0].layers[0]
    x = torch.randn(2, 8, 6, 5)
    assert relative_error(torch.fx.symbolic_trace(stage)(x), stage(x)) <= FLOAT32_BOUND


@pytest.mark.filterwarnings("ignore")
def test_onnx_needs_no_operator_of_ours(image, tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    model = Logits(tiny()).eval()
    expected = model(image)
    fuse(model)
    old = torch.__version__.startswith("2.9.")  # it exports for one image or for several
    batch = torch.export.Dim("batch", min=2 if old else 1, max=16)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (image,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (image, image[: 1 + old]):
        (actual,) = session.run(None, {graph.input[0].name: x.numpy()})
        assert relative_error(torch.from_numpy(actual), model(x)) <= FLOAT32_BOUND
    assert relative_error(model(image), expected) <= FLOAT32_BOUND
    assert fused_calls(model(image)) == 2
