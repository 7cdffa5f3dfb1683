"""The launches that C makes, and how often Python computes launches, on a GPU that does nothing."""

import json
import re

import hollow_support
import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    script = hollow_support.HERE / "plans_counted.py"
    return json.loads(hollow_support.run(tmp_path_factory.mktemp("hollow"), script).splitlines()[-1])


def test_a_new_size_and_a_compiled_model_are_worked_out_once_for_each_kind_of_block(found):
    launched, worked_out = found["a new size"]
    assert worked_out <= launched - 3 * 4  # three of four equal blocks
    assert found["again"] == [launched, 0]
    assert found["compiled"] == [2, 2]
    assert found["a new size in training"] == [2 * 4, 0]  # stem, downsampling layer and two kinds of blocks, both ways


def test_everything_that_a_model_calls_is_recorded(found):
    """Models in channels_last too: their own, and timm's after `fuse`, in training, in inference and frozen."""
    called = {name for name, plans in found["kinds"].items() if plans}
    assert called >= {"block_fwd", "block_bwd", "downsample_fwd", "downsample_bwd", "patchify_stem_bwd", "steps"}
    assert called & {"frozen_block_fwd", "frozen_downsample_fwd"}
    assert all(map(all, found["kinds"].values()))


def test_only_programs_that_run_without_python_are_given_the_kernels(found):
    assert "convnext_fast.blocks_fwd_gpu.default" in found["called"]
    assert all(name.startswith("convnext_fast.") and "_gpu" in name for name in found["called"])
    assert any("triton_kernel_wrapper" in name for name in found["called ahead of time"])
    assert not any("_gpu" in name for name in found["called ahead of time"])


def test_launches_are_those_of_triton(tmp_path):
    """Function, grid, threads, shared memory, stream and the bytes of every parameter."""
    script, driver = (hollow_support.HERE / name for name in ("launches_compared.py", "recording_driver.c"))
    printed = hollow_support.run(tmp_path, script, driver=driver)
    assert int(re.search(r"compared (\d+) launches", printed)[1]) > 100
