"""Each fused op at the sizes of ConvNeXt-T's stages, and each stage's block, forward, backward and both."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import default_device

from bench.cases import CONTENDERS, OpCase, prepare, stage_shapes

# Without --full, torch.compile runs only for this stage: compiling takes longer than everything else.
_COMPILED_STAGE = 2


def _cases(full: bool, on_cpu: bool) -> list[tuple[OpCase, str]]:
    batch = 1 if on_cpu else 64
    dtypes = ["float32"] if on_cpu else ["bfloat16"]
    if full:
        dtypes = ["float32", "bfloat16"] if on_cpu else ["float32", "bfloat16", "float16"]
    shapes = stage_shapes("tiny", batch)
    found = []
    for dtype in dtypes:
        for stage, shape in enumerate(shapes):
            modes = ("forward", "backward", "both")
            ops = {"convnext_block": modes}
            if full or stage == _COMPILED_STAGE:
                ops |= dict.fromkeys(("dwconv_layernorm", "pointwise_mlp"), modes if full else ("forward",))
            if stage < 3 and (full or stage == 0):
                ops["downsample"] = modes if full else ("forward",)
            found += [
                (OpCase(op, shape, dtype, mode), stage == _COMPILED_STAGE and op == "convnext_block")
                for op, chosen in ops.items()
                for mode in chosen
            ]
        stem = (batch, 224, 224, 3)
        found += [
            (OpCase("patchify_stem", stem, dtype, m), False) for m in (("forward", "both") if full else ("forward",))
        ]
    compiled = full or not on_cpu
    return [
        (case, name)
        for case, compile_too in found
        for name in CONTENDERS
        if name != "compile" or compiled or compile_too
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each op, shape, dtype, mode and contender."""
    chosen = _cases(metafunc.config.getoption("--full"), default_device().type == "cpu")
    metafunc.parametrize(("case", "name"), chosen, ids=[f"{case.name}-{name}" for case, name in chosen])


def test_op(case, name, record, device, request):
    """Measure one contender."""
    names = tuple(
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "callspec", None) and item.callspec.params.get("case") == case
    )
    record(case.name, name, dataclasses.asdict(case), lambda: prepare(names, case, device), case.work)
