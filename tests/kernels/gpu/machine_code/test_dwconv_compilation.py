"""What the compiler makes of the depthwise convolution for each target, without a device."""

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
from convnext_fast.kernels.dwconv import dwconv_dgrad, dwconv_fwd, dwconv_wgrad
from convnext_fast.kernels.dwconv.gluon import AVAILABLE, dwconv_gluon
from convnext_fast.kernels.dwconv.scalar import dwconv_scalar
from convnext_fast.kernels.dwconv.tensor_core import dwconv_tensor_core
from convnext_fast.kernels.dwconv.tuning import GluonConfig
from convnext_fast.kernels.layernorm import layernorm_bwd, layernorm_fwd
from convnext_fast.kernels.targets import SHARED_BYTES, TARGETS, planned_for

sys.path.append(str(Path(__file__).resolve().parents[4]))  # bench/ is not installed
from bench.static_analysis.analysis import analyse
from bench.static_analysis.compilation import GPU_TARGETS, compile_kernel, compile_launch, recording, specialise


def _launches(target, dtype):
    shape = (128, 14, 14, 384)
    x, weight = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(384, 1, 7, 7, device="meta")
    with planned_for(target), recording() as launches:
        u, _ = dwconv_fwd(x, weight, weight[:, 0, 0, 0], dtype)
        dwconv_dgrad(u, weight, x, x.dtype)
        dwconv_wgrad(x, u, 7)
    return launches


# By default the forward of a whole model, in test_budgets.py, and the following, both for sm_90.
@pytest.mark.thorough
@pytest.mark.parametrize("target", GPU_TARGETS)
def test_bfloat16_on_every_target(target):
    launches = _launches(target, torch.bfloat16)
    assert len(launches) == 4
    for launch in launches:
        made = compile_launch(launch, target)
        assert made.shared <= SHARED_BYTES[target], made
        assert made.spills == 0, made


FEW, MANY = (64, 56, 56, 96), (128, 14, 14, 512)


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        pytest.param(*case, marks=() if case == (MANY, "sm_90") else pytest.mark.thorough)
        for case in itertools.product((FEW, MANY), TARGETS)
    ],
)
def test_residual_stream_in_float32(target, shape):
    """As under autocast: x, or the residual and the sum, are in float32; two rows of x at a time on sm_86."""
    wide = torch.empty(shape, device="meta")
    u, weight = wide.to(torch.bfloat16), torch.empty(shape[3], 1, 7, 7, device="meta")
    with planned_for(target), recording() as launches:
        dwconv_fwd(wide, weight, weight[:, 0, 0, 0], u.dtype)
        dwconv_dgrad(u, weight, wide, wide.dtype)
        dwconv_dgrad(u, weight, wide, u.dtype)
        dwconv_wgrad(wide, u, 7)
    assert len(launches) == 5
    for launch in launches:
        made = compile_launch(launch, target)
        assert made.shared <= SHARED_BYTES[target], made
        assert made.spills == 0, made


@pytest.mark.parametrize("target", [pytest.param("sm_90", marks=pytest.mark.thorough), "gfx942"])
def test_float32(target):
    for launch in _launches(target, torch.float32):
        made = compile_launch(launch, target)
        assert made.spills == 0, made
        assert made.shared <= SHARED_BYTES[target], made


@pytest.mark.parametrize(
    ("channels", "dtype", "width"),
    [(40, "bfloat16", 16), pytest.param(36, "bfloat16", 8, marks=pytest.mark.thorough), (36, "float32", 16)],
)
def test_accesses_are_as_wide_as_the_channels_allow(channels, dtype, width):
    """In the forms that run everywhere: C is a multiple of 8 or 4, not of 16."""
    dtype = getattr(torch, dtype)
    x, weight = (
        torch.empty(32, 28, 28, channels, dtype=dtype, device="meta"),
        torch.empty(channels, 1, 7, 7, device="meta"),
    )
    form = dwconv_scalar if dtype == torch.float32 else dwconv_tensor_core
    options = {} if dtype == torch.float32 else {"dtype": dtype}
    with planned_for("sm_80"), recording() as launches:
        _, stats = form(x, weight, None, None, out_dtype=dtype, flip=False, statistics=True, **options)
        form(x, weight, None, x, out_dtype=dtype, flip=True, statistics=False, **options)
        dwconv_wgrad(x, x, 7)
        u, vector = x.flatten(0, 2), weight[:, 0, 0, 0]
        layernorm_fwd(u, stats, vector, vector, 1e-6)
        layernorm_bwd(u, u, stats, vector, 1e-6)
    launches = [launch for launch in launches if not launch.name.endswith("sum_kernel")]
    assert len(launches) == 6
    for launch in launches:
        made = analyse(specialise(launch, "sm_80"))
        assert made.spills == 0, made
        for name in {"x_ptr", "r_ptr", "u_ptr", "dn_ptr"} & (made.read.keys() - made.written.keys()):
            assert min(made.read[name]) == width, (made.kernel, name, made.read)
        for name in {"u_ptr", "n_ptr", "du_ptr"} & made.written.keys():
            assert min(made.written[name]) == width, (made.kernel, name, made.written)


def test_offsets_of_images_are_64_bit():
    """In the form that no interpreter runs: the row of the first image times the row length is an i64 product."""
    launch = _launches("sm_90", torch.bfloat16)[0]
    if launch.name != "dwconv_gluon_kernel":
        pytest.skip("needs Gluon as Triton has it from 3.6 on")
    text = compile_kernel(launch, "sm_90").asm["ttgir"]
    assert sum("arith.muli" in line and ": i64" in line for line in text.splitlines()) >= 4


@pytest.mark.skipif(not AVAILABLE, reason="needs Gluon as Triton has it from 3.6 on")
@pytest.mark.parametrize(
    ("residual", "segment"),
    [
        (True, 28),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((False, 56), (False, 28), (True, 56))),
    ],
)
def test_shared_memory_of_rows_is_not_reused_before_all_copies_arrive(segment, residual):
    """Else the compiler puts the last store's scratch buffer where copies still write: seen on an H100.

    An emulator completes copies at once and cannot show it. A buffer lives until its ``local_dealloc``.
    """
    x = torch.empty(128, 56, 56, 96, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(96, 1, 7, 7, device="meta")
    with planned_for("sm_90"), recording() as launches:
        dwconv_gluon(
            x, weight, None, x if residual else None, dtype=x.dtype, out_dtype=x.dtype, flip=residual,
            statistics=not residual, config=GluonConfig(segment, 4),
        )  # fmt: skip
    text = compile_kernel(launches[0], "sm_90").asm["ttgir"]
    last = max(text.rindex("tt.store"), text.rindex("ttg.async_copy_global_to_local"))
    assert text.index("ttg.async_wait {num = 0") > text.rindex("ttg.async_copy_global_to_local")
    assert text.count("ttg.local_dealloc") == text.count("ttg.local_alloc") == 1 + residual
    assert text.index("ttg.local_dealloc") > last


@pytest.mark.skipif(not AVAILABLE, reason="needs Gluon as Triton has it from 3.6 on")
@pytest.mark.parametrize(
    ("taps", "segment", "target"),
    [
        pytest.param(*case, marks=() if case in ((3, 14, "sm_80"), (7, 4, "sm_80")) else pytest.mark.thorough)
        for case in itertools.product((3, 5, 7), (4, 14), ("sm_80", "sm_90"))
    ],
)
def test_every_copy_is_in_a_group_that_is_waited_for(taps, segment, target):
    """A copy that is not committed before the wait for its row counts in a later group."""
    x, weight = (
        torch.empty(8, 14, 14, 64, dtype=torch.bfloat16, device="meta"),
        torch.empty(64, 1, taps, taps, device="meta"),
    )
    options = {"dtype": x.dtype, "out_dtype": x.dtype, "flip": True, "statistics": False}
    with planned_for(target), recording() as launches:
        dwconv_gluon(x, weight, None, x, **options, config=GluonConfig(segment, 4))
    (launch,) = launches
    assert launch.arguments["EARLY"]
    ptx = compile_kernel(launch, target).asm["ptx"]
    steps = re.findall(r"cp\.async\.(commit_group|wait_group|c[ag])", ptx)
    assert steps.count("wait_group") >= taps
    opened = 0
    for step in steps:
        if step == "wait_group":
            assert opened == 0, f"{opened} copies are not committed"
        opened = 0 if step == "commit_group" else opened + (step != "wait_group")


@pytest.mark.thorough
def test_a_residual_that_is_not_aligned():
    """Copies of 16 bytes cannot start there."""
    x = torch.empty(2, 7, 8, 32, dtype=torch.bfloat16)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    weight = torch.empty(32, 1, 7, 7)
    early = []
    for residual in (x, shifted):
        with planned_for("sm_90"), recording() as launches:
            dwconv_dgrad(x, weight, residual, x.dtype)
        early.append(launches[0].arguments["EARLY"])
        assert compile_launch(launches[0], "sm_90").spills == 0
    assert early == [True, False]
