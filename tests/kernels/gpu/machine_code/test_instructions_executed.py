"""The column of ``python -m bench.machine_code`` that an emulator counts."""

import pytest

from bench.static_analysis.emulator import emulator_path
from bench.static_analysis.executed import instructions_per_output
from bench.static_analysis.sweep import passes


@pytest.fixture
def _nan_poisoned_allocations():
    """Filling allocations would be recorded."""


@pytest.mark.thorough
@pytest.mark.skipif(emulator_path() is None, reason="sass_emulator not found: set CONVNEXT_FAST_SASS_EMULATOR")
def test_instructions_of_a_pass():
    chosen = passes(("atto",), ("bf16",), ("inference",), (1,), ("sm_80", "sm_90"))
    found = instructions_per_output(chosen)
    assert len(found) >= 10
    for key, count in found.items():
        assert "'sm_80'" in key
        # 49 multiply-adds on tensor cores take fewer than 20; a matrix product more than its epilogue.
        least, most = (8, 20) if ".dwconv_" in key else (10, 1000)
        assert least <= count <= most, key
    assert instructions_per_output(chosen[1:]) == {}
