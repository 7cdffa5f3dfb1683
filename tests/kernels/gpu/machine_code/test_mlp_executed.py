import pytest
import torch
from convnext_fast.kernels.mlp import fused, fused_bwd, gemm, mlp_bwd, mlp_fwd, tuning
from convnext_fast.kernels.mlp.fused import fused_mlp_fwd
from convnext_fast.kernels.mlp.fused_bwd import fused_mlp_bwd
from convnext_fast.kernels.mlp.gemm import gemm_mlp_fwd
from convnext_fast.kernels.mlp.gemm_bwd import gemm_mlp_bwd
from mlp_cases import EMPTY, FAR, Case, check_backward, check_forward, check_result_in_two_dtypes, inputs, run_forward

BF16, FP16 = torch.bfloat16, torch.float16
thorough = pytest.mark.thorough
# By default each kernel in bfloat16 and in float16, with all operands and without, in few shapes.
FORWARD = [
    (fused_mlp_fwd, Case(3, 49, 40, 160, BF16, full=False)),
    (fused_mlp_fwd, Case(1, 50, 37, 77, FP16)),
    pytest.param(fused_mlp_fwd, Case(3, 70, 96, 384, BF16), marks=thorough),
    pytest.param(fused_mlp_fwd, Case(1, 130, 192, 192, FP16), marks=thorough),
    (gemm_mlp_fwd, Case(1, 9, 1, 1, BF16)),
    (gemm_mlp_fwd, Case(1, 50, 37, 77, FP16, full=False)),
    (gemm_mlp_fwd, Case(1, 130, 192, 256, BF16)),
]
BACKWARD = [
    (fused_mlp_bwd, Case(3, 49, 40, 160, BF16, full=False)),
    (fused_mlp_bwd, Case(1, 50, 37, 77, FP16)),
    pytest.param(fused_mlp_bwd, Case(3, 70, 96, 128, BF16), marks=thorough),
    pytest.param(gemm_mlp_bwd, Case(1, 9, 1, 1, FP16, draws=8), marks=thorough),
    (gemm_mlp_bwd, Case(1, 50, 37, 77, FP16, full=False)),
    pytest.param(gemm_mlp_bwd, Case(3, 70, 96, 128, BF16), marks=thorough),
]


def name(value):
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("forward", "case"), FORWARD, ids=lambda value: getattr(value, "__name__", str(value)))
def test_forward(emulating, forward, case):
    with emulating(arch=80, detect_races="rw"):
        check_forward(case, forward)


# By default the smallest and the largest: they differ only in numbers.
TILES = [
    pytest.param(tile, marks=() if tile in (tuning._SMALL[0], tuning._LARGE[1]) else thorough)
    for tile in (*tuning._SMALL, *tuning._LARGE)
]


@pytest.mark.parametrize("config", TILES, ids=str)
def test_tiles_of_few_and_of_many_rows(emulating, config, monkeypatch):
    """The tiles of sm_90, here in sm_80's code."""
    monkeypatch.setattr(gemm, "gemm_configs", lambda *a: (config,))
    with emulating(arch=80, detect_races="rw"):
        check_forward(Case(3, 25, 72, 264, BF16), gemm_mlp_fwd)


@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP16, marks=thorough)], ids=str)
def test_tile_of_many_rows_under_autocast(emulating, dtype, monkeypatch):
    monkeypatch.setattr(gemm, "gemm_configs", lambda *a: (tuning._LARGE[0],))
    with emulating(arch=80, detect_races="rw"):
        check_forward(Case(3, 70, 200, 72, dtype, residual_dtype=torch.float32), gemm_mlp_fwd)


@pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=thorough), FP16], ids=str)
def test_fused_tile_of_many_rows(emulating, dtype, monkeypatch):
    many = tuning.fused_configs(96, 384, True, "sm_90", False, False, True)[0]
    assert many.BLOCK_M == 256
    monkeypatch.setattr(fused, "fused_configs", lambda *a: (many,))
    with emulating(arch=80, detect_races="rw"):
        check_forward(Case(3, 100, 96, 128, dtype), fused_mlp_fwd)


@pytest.mark.parametrize("precision", [pytest.param("ieee", marks=thorough), "tf32"], indirect=True)
def test_forward_in_float32(emulating, precision):
    with emulating(arch=80, detect_races="rw"):
        check_forward(Case(1, 50, 37, 77, torch.float32))


def test_forward_under_autocast_and_of_an_empty_batch(emulating):
    with emulating(arch=80, detect_races="rw"):
        check_forward(Case(2, 20, 24, 96, torch.bfloat16, residual_dtype=torch.float32))
        for case in EMPTY:
            check_forward(case)


@pytest.mark.parametrize("forward", [fused_mlp_fwd, gemm_mlp_fwd])
def test_result_in_two_dtypes(emulating, forward):
    with emulating(arch=80, detect_races="rw"):
        check_result_in_two_dtypes(Case(2, 35, 72, 96, BF16), forward)


@pytest.mark.parametrize(
    ("channels", "allowed"),
    [pytest.param(40, 14.5, marks=thorough), (96, 12.3), pytest.param(192, 15.8, marks=thorough)],
)
def test_instructions_of_the_fused_forward(emulating, channels, allowed):
    """Thread instructions per hidden element besides the MMAs, for the whole kernel, GELU included."""
    given = inputs(Case(1, 256, channels, 4 * channels, torch.bfloat16)) | {"drop_scale": None}
    with emulating(arch=80, detailed=False) as emulation:
        run_forward(Case(1, 256, channels, 4 * channels, torch.bfloat16), given, mlp_fwd)
    counts = emulation.launches[-1].by_class()
    per_element = 32 * (sum(counts.values()) - counts["tensor"]) / (256 * 4 * channels)
    assert per_element <= allowed, f"C = {channels}: {per_element:.2f}"


@pytest.mark.parametrize(("backward", "case"), BACKWARD, ids=lambda value: getattr(value, "__name__", str(value)))
def test_backward(emulating, backward, case):
    with emulating(arch=80, detect_races="rw"):
        check_backward(case, backward)


@pytest.mark.parametrize(
    ("case", "save_hidden"),
    [
        (Case(1, 50, 37, 77, FP16), False),
        (Case(3, 70, 96, 128, BF16), True),
        pytest.param(Case(1, 50, 37, 77, FP16), True, marks=thorough),
        pytest.param(Case(3, 70, 96, 128, BF16), False, marks=thorough),
    ],
    ids=str,
)
def test_backward_whose_sums_two_programs_share(emulating, monkeypatch, case, save_hidden):
    """As with warp groups beyond 128 channels."""
    monkeypatch.setattr(fused_bwd, "weights_apart", lambda channels: True)
    with emulating(arch=80, detect_races="rw"):
        check_backward(case, fused_mlp_bwd, save_hidden)


@pytest.mark.parametrize("precision", ["ieee", pytest.param("tf32", marks=thorough)], indirect=True)
def test_backward_in_float32(emulating, precision):
    with emulating(arch=80, detect_races="rw"):
        check_backward(Case(1, 70, 37, 77, torch.float32))


@pytest.mark.parametrize("precision", [pytest.param("ieee", marks=thorough), "tf32"], indirect=True)
@pytest.mark.parametrize("case", [pytest.param(FAR[0], marks=thorough), FAR[1]], ids=str)
def test_float32_far_from_zero(emulating, precision, case):
    """If the convolution's output has a mean much larger than its deviations, TF32 has no digits to cancel."""
    with emulating(arch=80, detect_races="rw"):
        check_forward(case)
        check_backward(case)


@pytest.mark.parametrize("backward", [fused_mlp_bwd, gemm_mlp_bwd])
def test_backward_from_saved_activations_under_autocast(emulating, backward):
    with emulating(arch=80, detect_races="rw"):
        case = Case(2, 35, 24, 96, torch.bfloat16, residual_dtype=torch.float32)
        check_backward(case, backward, save_hidden=True, again=True)


def test_backward_of_an_empty_batch(emulating):
    with emulating(arch=80):
        for case in EMPTY:
            check_backward(case, mlp_bwd)
