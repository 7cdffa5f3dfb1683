"""opcheck of every operator with the machine code of its kernels: it does what compilers are told about it."""

import pytest
import torch
from operator_cases import KERNELS_ALONE, ON_CPU, WITHOUT_GRADIENT, cases

from convnext_fast.backends import environment


@pytest.mark.parametrize("name", [*KERNELS_ALONE, *(pytest.param(name, marks=pytest.mark.thorough) for name in ON_CPU)])
def test_opcheck(name, emulating, monkeypatch):
    monkeypatch.setattr(environment, "REQUEST", "triton")
    every = {"test_utils": WITHOUT_GRADIENT} if name.endswith("_bwd") or "frozen" in name else {}
    with emulating(arch=80):
        for arguments in cases(name, torch.float16):
            torch.library.opcheck(getattr(torch.ops.convnext_fast, name), arguments, **every)
