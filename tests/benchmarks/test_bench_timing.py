"""A speed is given only where the result is right, and counts are what they say."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys

import pytest
import torch
from bench_support import CPU, NAMES, ROOFLINE, measured_rows, tiny_cell
from torch.utils.flop_counter import FlopCounterMode

from bench import cases, correctness, environment, runtimes, scaling, timing, variants, work
from bench.timing import Contender, Job, Reference
from convnext_fast import measuring

FIGURES = {"p20_ms", "p50_ms", "p80_ms", "rounds", "gbs", "tflops", "of_roofline", "roofline", "error", "peak_mib"}
FIGURES |= {"error_bound", "saved_mib", "images_per_s", "first_call_s", "key", "variant", "batch", "side", "dtype"}


@pytest.fixture(scope="module")
def inference_rows():
    return measured_rows("inference", 2, (*NAMES, "frozen"))


def test_rows_are_complete(inference_rows):
    assert [row["contender"] for row in inference_rows] == [*NAMES, "frozen"]
    for row in inference_rows:
        assert row.keys() >= FIGURES
        assert row["failure"] is None
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert 0 < row["error"] <= row["error_bound"] == 1e-5
        assert row["peak_mib"] > 0 == row["saved_mib"]
        assert row["images_per_s"] == pytest.approx(2e3 / row["p50_ms"])


def perturbed(build, change):
    """A contender that is ours but for a change to its results."""
    job = build()
    return Job(job.ready, lambda: change(job.results()))


def scaled(results):
    return [results[0], results[1], *(1.0001 * gradient for gradient in results[2:])]


def not_a_number(results):
    results[-1].flatten()[-1] = math.nan
    return results


def other_shape(results):
    return [results[0][:1], *results[1:]]


def test_a_wrong_result_has_no_speed():
    """Of gradients alone, of one element, of the shape; the others keep their rows."""
    subject = variants.Subject(tiny_cell("training"), CPU)
    build = functools.partial(variants.build, variants.RECIPES["fused"], subject)
    wrong = {
        change.__name__: Contender(functools.partial(perturbed, build, change), subject.reference)
        for change in (scaled, not_a_number, other_shape)
    }
    eager, fused, *rows = measured_rows("training", 2, ("eager", "fused"), **wrong)
    assert [row["contender"] for row in rows] == list(wrong)
    for row in rows:
        assert row["failure"].startswith("WrongResult: relative error")
        assert not row.keys() & {"p50_ms", "images_per_s", "gbs", "of_roofline"}
    assert all(other["failure"] is None and other["p50_ms"] > 0 for other in (eager, fused))


def test_a_failure_is_a_row():
    def out_of_memory():
        raise torch.OutOfMemoryError("no room\nfor details")

    def late():
        raise ValueError("only when timed")

    reference = Reference([torch.ones(1)], [0.0])
    right = Job(lambda: lambda: None, lambda: [torch.ones(1)])
    found = list(timing.measure({"a": Contender(out_of_memory, reference)}, CPU, 0.01))
    assert found == [("a", {"failure": "OutOfMemoryError: no room"}, [])]
    found = list(timing.measure({"b": Contender(lambda: Job(late, right.results), reference)}, CPU, 0.01))
    assert found[0].figures == {"failure": "ValueError: only when timed"}


def test_training_saves_less_than_eager():
    rows = {row["contender"]: row for row in measured_rows("training", 2, ("eager", "fused"))}
    assert 0 < rows["fused"]["saved_mib"] < rows["eager"]["saved_mib"] <= rows["eager"]["peak_mib"]


def test_each_result_has_its_own_bound():
    """A gradient that bfloat16 can hardly tell allows nothing to the others; nothing is held against an overflow."""
    expected = [torch.ones(8).double(), torch.ones(8).double(), torch.ones(8).double()]
    eager = [expected[0] * 1.5, expected[1] * 1.01, expected[2] * 1.001]
    reference = Reference.of(expected, eager, "bfloat16")
    assert reference.bounds == pytest.approx([1.0, 0.02, 0.02])
    assert reference.worst([expected[0] * 1.9, expected[1] * 1.03, expected[2]]) == pytest.approx((0.03, 0.02))
    assert reference.worst([expected[0] * 1.9, expected[1], expected[2]]) == pytest.approx((0.9, 1.0))
    assert Reference.of(expected, expected, "float32").bounds == pytest.approx([1e-5] * 3)
    with pytest.raises(ValueError, match="not finite"):
        Reference.of(expected, [expected[0] * math.inf, *eager[1:]], "float16")


def test_missing_package_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"needs openvino: pip install -e '\.\[bench\]'"):
        runtimes.load("openvino", torch.nn.Identity(), torch.zeros(1, 3, 32, 32))


def test_onnx_runtime_is_checked_and_timed():
    (row,) = measured_rows("inference", 2, ("ONNX Runtime",))
    assert row["failure"] is None
    assert row["peak_mib"] is None  # its memory is not PyTorch's


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("mode", ["forward", "both"])
def test_every_op_is_measured_by_what_it_is_checked_on(op, mode):
    case = cases.OpCase(op, (1, 64, 64, 3) if op == "patchify_stem" else (1, 8, 8, 16), "float32", mode)
    names = ("eager", "eager channels_last", "fused")
    for name, figures, times in timing.measure(cases.prepare(names, case, CPU), CPU, 0.01):
        assert figures["failure"] is None, (name, figures)
        assert len(times) == figures["rounds"] >= timing.LEAST_ROUNDS


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("op", cases.OPS)
def test_work_of_ops_is_pytorchs_count(op, mode):
    """FLOPs of convolutions and products, forward and backward, by PyTorch's own counter."""
    case = cases.OpCase(op, (1, 64, 64, 3) if op == "patchify_stem" else (1, 8, 8, 16), "float32", mode)
    if mode == "both" and op in ("dwconv_layernorm", "convnext_block", "convnext_v2_block"):
        # The counter takes the weight's gradient of a depthwise convolution for a dense one's.
        assert case.work.flops == 3 * dataclasses.replace(case, mode="forward").work.flops
        return
    with FlopCounterMode(display=False) as counter:
        cases.results(case, case.form(False), case.inputs(CPU))
    assert case.work.flops == counter.get_total_flops()


def test_work_of_models_is_pytorchs_count():
    cell = variants.Cell("atto", 2, 64, "float32", "inference")
    subject = variants.Subject(cell, CPU)
    with FlopCounterMode(display=False) as counter:
        subject.model(fused=False)(subject.images[0])
    assert work.model_work(cell.config, 2, 64, 4, training=False).flops == counter.get_total_flops()


def test_bytes_of_a_block():
    """x and y once forward; x, dy, dx and twice the parameters backward."""
    x, parameters = 4 * 6 * 6 * 16, 16 * (49 + 8 * 16 + 9)
    forward, both = (cases.OpCase("convnext_block", (4, 6, 6, 16), "bfloat16", m).work for m in ("forward", "both"))
    assert forward.bytes == 2 * (2 * x + parameters)
    assert both.bytes == 2 * (5 * x + 3 * parameters)


def test_peak_and_saved_bytes():
    def call():
        a = torch.empty(1 << 20)
        b = a * 2  # 8 MiB at once
        del a
        return b.sum()

    assert timing.cpu_peak_bytes(call) == pytest.approx(8 << 20, rel=0.01)
    layer = torch.nn.Linear(256, 8)
    x = torch.randn(64, 256, requires_grad=True)
    saved = measuring.saved_bytes(lambda: layer(x), layer.parameters())
    assert saved == 64 * 256 * 4
    assert measuring.saved_bytes(lambda: layer(x), [*layer.parameters(), x]) == 0


def test_memory_does_not_depend_on_the_calls_before():
    subject = variants.Subject(tiny_cell("training"), CPU)
    job = variants.build(variants.RECIPES["fused"], subject)
    first = timing.memory(job, CPU)
    job.ready()()
    assert timing.memory(job, CPU) == first
    parameters = sum(p.numel() * 4 for p in subject.model(fused=True).parameters())
    assert first["peak_mib"] > parameters / 2**20  # every gradient is made anew


def test_quantiles_and_deviation():
    found = timing.quantiles([t / 1e3 for t in range(1, 12)])
    assert found == {"p20_ms": pytest.approx(3), "p50_ms": pytest.approx(6), "p80_ms": pytest.approx(9), "rounds": 11}
    assert scaling.deviation([(1, 3.0), (2, 5.0), (4, 9.0)]) == pytest.approx(0)
    assert scaling.deviation([(4, 9.0), (1, 3.0), (2, 6.0)]) == pytest.approx(0.2)
    assert scaling.deviation([(1, 3.0), (2, 5.0)]) is None


def test_correctness_finds_what_is_wrong(monkeypatch):
    case = cases.OpCase("dwconv_layernorm", (1, 6, 6, 8), "float32", "both")
    assert correctness.row_of("against float64", case, CPU)["passed"] is True
    assert correctness.row_of("same bits four times", case, CPU)["passed"] is True
    right = cases.OPS["dwconv_layernorm"]
    monkeypatch.setitem(
        cases.OPS, "dwconv_layernorm", (lambda fused, *t: right[0](fused, *t) * (1.001 if fused else 1.0), right[1])
    )
    row = correctness.row_of("against float64", case, CPU)
    assert row["passed"] is False
    assert row["error"] == pytest.approx(1e-3, rel=0.1)


def test_a_single_different_run_in_ten_is_found(monkeypatch):
    case = cases.OpCase("dwconv_layernorm", (1, 6, 6, 8), "float32", "both")
    assert correctness.row_of(correctness.OFTEN, case, CPU)["passed"] is True
    op, shapes = cases.OPS["dwconv_layernorm"]
    calls = itertools.count()
    monkeypatch.setitem(
        cases.OPS, "dwconv_layernorm", (lambda *a: op(*a) + (1e-6 if next(calls) == 8 else 0.0), shapes)
    )
    assert correctness.row_of("same bits four times", case, CPU)["passed"] is True
    assert correctness.row_of(correctness.OFTEN, case, CPU)["passed"] is False


def test_checks_that_cannot_run_give_the_reason():
    assert {case.dtype for case in correctness.cases(CPU)} == set(environment.DTYPES)
    assert {case.op for case in correctness.cases(CPU)} == set(cases.OPS)
    for row in correctness.huge_rows(CPU):
        assert (row["passed"], row["failure"]) == (None, "needs a CUDA device")


def test_rates_are_those_of_the_machine(monkeypatch):
    monkeypatch.setattr(environment, "cache_bytes", lambda device: 1 << 20)  # a large one's copies take seconds
    rates = environment.measured_rates(CPU, ("float32",))
    assert 1e9 < rates.flops["float32"] < 1e14
    assert 1e8 < rates.bandwidth < 1e13
    assert ROOFLINE.seconds(1e12, 1e10, "float32") == 1.0
    assert ROOFLINE.seconds(1e11, 1e11, "float32") == 1.0
    assert environment.roofline(CPU, rates) is rates
