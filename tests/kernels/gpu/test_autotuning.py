"""The choice of a configuration by measurement: made once, stored, read back. The measured times are made up."""

import os
import subprocess
import sys

import pytest
import torch
from convnext_fast.kernels import autotuning
from convnext_fast.kernels.autotuning import SHARES, choose, fastest, key_of, load, store
from convnext_fast.kernels.dwconv.tuning import GluonConfig, ScalarConfig, scalar_candidates, segment_candidates
from convnext_fast.kernels.mlp.tuning import FusedConfig, fused_configs, gemm_configs
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources

CANDIDATES = fused_configs(192, 768, True, "sm_80")
KEY = key_of("a kernel", "a device", torch.bfloat16, 4096, (192, 768))


@pytest.fixture(autouse=True)
def _new_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotuning, "_chosen", {})


def never(candidate):
    raise AssertionError("measured again")


def test_the_fastest_is_chosen_stored_and_read_back(monkeypatch):
    times = dict(zip(CANDIDATES, (3.0, 1.0, 2.0), strict=True))
    assert choose(KEY, CANDIDATES, times.__getitem__) == CANDIDATES[1]
    assert choose(KEY, CANDIDATES, never) == CANDIDATES[1]
    monkeypatch.setattr(autotuning, "_chosen", {})  # as in another process
    assert choose(KEY, CANDIDATES, never) == CANDIDATES[1]
    assert choose(KEY, CANDIDATES, None) == CANDIDATES[1]
    with pytest.raises(AssertionError, match="measured again"):
        choose(key_of("another kernel"), CANDIDATES, never)


def test_without_timing_the_default_is_used_and_not_stored():
    assert choose(KEY, CANDIDATES, None) == CANDIDATES[0]
    assert load(KEY, CANDIDATES) is None
    times = dict(zip(CANDIDATES, (3.0, 2.0, 1.0), strict=True))
    assert choose(KEY, CANDIDATES, times.__getitem__) == CANDIDATES[2]


def test_a_candidate_that_does_not_fit_loses():
    def measure(candidate):
        if candidate != CANDIDATES[2]:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return 5.0

    assert choose(KEY, CANDIDATES, measure) == CANDIDATES[2]


@pytest.mark.parametrize("content", ["", "{", "null", "[1, 2]", "{}", '{"BLOCK_M": 1}', "\x00\xff"])
def test_a_damaged_file_is_measured_again(content):
    get_cache_manager(KEY).put(content, autotuning._FILE, binary=False)
    assert load(KEY, CANDIDATES) is None
    times = dict(zip(CANDIDATES, (2.0, 1.0, 3.0), strict=True))
    assert choose(KEY, CANDIDATES, times.__getitem__) == CANDIDATES[1]
    assert load(KEY, CANDIDATES) == CANDIDATES[1]


def test_a_stored_choice_that_is_no_candidate_is_ignored():
    store(KEY, FusedConfig(1, 1, 1, 1))
    assert load(KEY, CANDIDATES) is None


def test_keys_differ_in_every_part():
    parts = ("source", "device", torch.bfloat16, 4096, (96, 384), *CANDIDATES)
    others = ("changed", "other", torch.float16, 8192, (96, 768), *fused_configs(96, 384, True, "sm_80"))
    keys = {key_of(*parts)} | {key_of(*parts[:i], others[i], *parts[i + 1 :]) for i in range(len(parts))}
    assert len(keys) == len(parts) + 1


@pytest.mark.parametrize(
    ("module", "variable", "value"),
    [
        *[("autotuning", "CONVNEXT_FAST_AUTOTUNE", value) for value in ("1", "0", "", "yes")],
        ("mlp.gemm_tma", "CONVNEXT_FAST_TMA", "1"),
    ],
)
def test_environment_variables(module, variable, value):
    code = f"from convnext_fast.kernels.{module} import ENABLED; print(ENABLED)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, variable: value}, capture_output=True, text=True, check=False
    )
    if value == "yes":
        assert f"ValueError: {variable} is 'yes': expected 0 or 1" in done.stderr
    else:
        assert done.stdout.strip() == str(value == "1")


def test_a_cpu_takes_the_default(monkeypatch):
    monkeypatch.setattr(autotuning, "ENABLED", True)
    assert fastest(None, never, CANDIDATES, torch.empty(4), 4, ()) == CANDIDATES[0]


@pytest.mark.parametrize("channels", [40, 96, 192])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_candidates_are_few_and_differ(channels, lean, target):
    fused = fused_configs(channels, 4 * channels, lean, target)
    for candidates in (fused, *(gemm_configs(rows, channels, torch.float16, target) for rows in (49, 4096, 100_000))):
        assert 1 < len(set(candidates)) == len(candidates) <= 4


@pytest.mark.parametrize("height", [1, 3, 7, 14, 56])
@pytest.mark.parametrize("segment", [2, 8, 56])
def test_candidates_of_the_convolution_start_with_the_default_and_fit_the_height(height, segment):
    default = GluonConfig(min(segment, height), 4)
    candidates = segment_candidates(default, height)
    assert candidates[0] == default
    assert len(set(candidates)) == len(candidates) <= 4
    assert {candidate.segment for candidate in candidates} >= {height, -(-height // 2)}
    assert all(0 < candidate.segment <= height for candidate in candidates)
    first, second = scalar_candidates(ScalarConfig(7, 16, 4))
    assert (first.block_rows, second.block_rows) == (16, 8)


def test_shares_are_whole_blocks():
    assert [share.of(96, 32) for share in SHARES] == [96, 64, 192]
    assert [share.of(32, 32) for share in SHARES] == [32, 32, 64]
