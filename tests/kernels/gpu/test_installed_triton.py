"""A launch of each kernel of ConvNeXt-T, compiled for sm_90 by the installed Triton.

`.ci/floors` runs this with the oldest Triton; the default tests of machine code cover the newest.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[3]))  # bench/ is not installed
from bench.static_analysis.analysis import analyse
from bench.static_analysis.sweep import collect, describe, passes

# The most seen in 16 bits with Triton 3.5.1, 3.6.0 or 3.8.0. test_budgets.py requires none with Triton 3.9.
SPILLS = {
    "_mlp_fwd_kernel": 4,
    "_fc1_kernel": 10,
    "_hidden_grad_kernel": 79,
    "_weight_kernel": 27,  # takes a third less time than a tile without spills, in the resource model
    "_stem_bwd_kernel": 59,
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("variant", "dtype"), [("tiny", "bf16"), ("tiny", "autocast-bf16"), ("tiny", "fp32"), ("v2_tiny", "bf16")]
)
def test_every_kernel_compiles(variant, dtype):
    chosen = passes((variant,), (dtype,), ("inference", "training"), (1,), ("sm_90",), (0.1,))
    first = {}
    for kernel in collect(chosen, shallow=True):
        first.setdefault(kernel.launches[0].name, kernel)
    assert len(first) > 15
    wrong = []
    for name, kernel in first.items():
        try:
            spills = analyse(kernel.specialised, mix=False).spills
        except Exception as error:  # Triton raises many kinds, and the test shows all kernels that fail
            wrong.append(f"{describe(kernel)}: {type(error).__name__}: {error}")
            continue
        if dtype != "fp32" and spills > SPILLS.get(name, 0):
            wrong.append(f"{describe(kernel)}: {spills} spills")
    assert not wrong, "\n".join(wrong)
