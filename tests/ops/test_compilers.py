"""Whole models under `torch.compile`, `torch.export`, AOTInductor and ONNX: both surfaces, training and inference."""

from __future__ import annotations

import functools

import pytest
import torch
from support import BOUNDS, gradients, randomise, relative_error
from torch.utils.checkpoint import checkpoint

from convnext_fast import ConvNext, ConvNextConfig, ConvNextForImageClassification
from convnext_fast.cli.export import export_onnx

FIELDS = {"num_stages": 2, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 5}


def build(surface, dtype=torch.float32, **fields):
    model = {"timm": ConvNext, "transformers": ConvNextForImageClassification}[surface]
    return randomise(model(ConvNextConfig(**FIELDS, **fields), dtype=dtype))


def loss_and_logits(model, x, labels):
    if isinstance(model, ConvNext):
        logits = model(x)
        return torch.nn.functional.cross_entropy(logits, labels), logits
    output = model(x, labels=labels)
    return output.loss, output.logits


both = pytest.mark.parametrize("surface", [pytest.param("timm", marks=pytest.mark.thorough), "transformers"])


@pytest.mark.parametrize(
    ("surface", "checkpointing"),
    [
        ("timm", True),
        pytest.param("transformers", False, marks=pytest.mark.thorough),
        pytest.param("timm", False, marks=pytest.mark.thorough),
        pytest.param("transformers", True, marks=pytest.mark.thorough),
    ],
)
def test_a_training_step_is_one_graph_for_any_size(surface, checkpointing):
    """Loss, logits and every gradient as without a compiler; no compilation for a new batch or resolution."""
    model = build(surface, torch.float64).train()
    if checkpointing:
        (model.set_grad_checkpointing if surface == "timm" else model.gradient_checkpointing_enable)()
    step = functools.partial(loss_and_logits, model)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")

    def images(*size):
        return torch.randn(size[0], 3, *size[1:], dtype=torch.float64), torch.arange(size[0]) % 5

    for _ in range(2):  # the first labels set the problem type, so that transformers' surface compiles once more
        compiled(*images(4, 32, 56))
    for size in [(2, 32, 40), (5, 40, 64)]:
        inputs = images(*size)
        expected = step(*inputs)
        with torch.compiler.set_stance("fail_on_recompile"):
            actual = compiled(*inputs)
        want, got = (gradients(model, list(outputs), []) for outputs in (expected, actual))
        for name, value in {"loss": expected[0], "logits": expected[1], **want}.items():
            result = {"loss": actual[0], "logits": actual[1], **got}[name]
            assert relative_error(result, value) <= BOUNDS[torch.float64], name


@pytest.mark.parametrize("recompute", [0, 2])
def test_checkpointing_by_hand_and_levels_of_recompute_compile(recompute):
    model = build("timm", torch.float64).train()
    model.recompute = recompute
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = gradients(model, [model(x)], [])

    def call(x):
        return model.head(checkpoint(model.forward_features, x, use_reentrant=False))

    actual = gradients(model, [torch.compile(call, fullgraph=True, backend="aot_eager")(x)], [])
    assert all(relative_error(actual[name], value) <= BOUNDS[torch.float64] for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiles_under_autocast(dtype):
    """The same dtypes as without a compiler, and errors against float64 of the same size.

    A compiler may decompose PyTorch's own layers and so round elsewhere. All errors together may be twice as large as
    without it, but not half as large, which would mean a wider dtype. Each alone may be four times as large, because a
    single small gradient's error is a matter of luck.
    """
    model = build("timm").train()
    x = torch.randn(2, 3, 32, 32)
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype):
            y = call(x)
        results.append({"logits": y, **gradients(model, [y], [])})
    y = model.double()(x.double())
    exact = {"logits": y, **gradients(model, [y], [])}
    eager, compiled = (torch.tensor([relative_error(made[name], exact[name]) for name in exact]) for made in results)
    assert [value.dtype for value in results[1].values()] == [value.dtype for value in results[0].values()]
    assert 0.5 < (compiled.square().mean() / eager.square().mean()).sqrt() <= 2
    assert (compiled <= 4 * eager).all(), dict(zip(exact, (compiled / eager).tolist(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_replays_as_a_cuda_graph():
    model = build("timm").cuda().train()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        expected, actual = ({"logits": y.clone(), **gradients(model, [y], [])} for y in (model(x), compiled(x)))
        assert all(relative_error(actual[name], value) <= BOUNDS[torch.float32] for name, value in expected.items())


@both
def test_exports_with_any_batch_and_resolution(surface):
    model = build(surface).eval()
    dynamic = {0: torch.export.Dim("N", max=64), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(2, 3, 32, 40),), dynamic_shapes=[dynamic])
    for size in [(1, 3, 48, 32), (5, 3, 64, 72)]:
        x = torch.randn(size)
        actual, expected = program.module()(x), model(x)
        if surface == "transformers":
            actual, expected = actual.logits, expected.logits
        assert relative_error(actual, expected) <= BOUNDS[torch.float32]


@pytest.mark.thorough
@pytest.mark.parametrize("surface", ["timm", "transformers"])
def test_runs_ahead_of_time_without_python(surface, tmp_path):
    """AOTInductor's library, from an export with any batch."""
    model = build(surface).eval()
    example = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("N", max=64)},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        x = torch.randn(5, 3, 32, 32)
        actual, expected = torch._inductor.aoti_load_package(package)(x), model(x)
    if surface == "transformers":
        actual, expected = actual.logits, expected.logits
    assert relative_error(actual, expected) <= BOUNDS[torch.float32]


def test_onnx_has_only_standard_operators_and_agrees(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    model = build("timm")
    assert export_onnx(model, tmp_path / "model.onnx", 32, 40) <= BOUNDS[torch.float32]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    shape = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert (graph.input[0].name, shape[1:], graph.output[0].name) == ("pixel_values", [3, 32, 40], "logits")
    assert isinstance(shape[0], str)


@pytest.mark.thorough
def test_onnx_of_the_other_surface_with_any_size(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    model = build("transformers").eval()
    dynamic = ({0: torch.export.Dim("N"), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    path = str(tmp_path / "model.onnx")
    example = torch.randn(2, 3, 32, 40)
    torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    x = torch.randn(3, 3, 48, 32)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(outputs[0]), model(x).logits) <= BOUNDS[torch.float32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, path: (model, path.with_suffix(".pt")), "expected a name that ends in .onnx"),
        (lambda model, path: (ConvNext(ConvNextConfig(**{**FIELDS, "num_labels": 0})), path), "no classifier"),
    ],
)
def test_what_onnx_cannot_express_is_an_error(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(*change(build("timm"), tmp_path / "model.onnx"), 32, 32)
