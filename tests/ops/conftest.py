"""Frozen models whose steps are counted."""

import pytest
from sequence_support import CONFIG, KINDS
from support import randomise

from convnext_fast.backends.cpu import llvm


@pytest.fixture(params=KINDS)
def model(request):
    return randomise(request.param(CONFIG)).eval().freeze()


@pytest.fixture
def chains(monkeypatch):
    """How many steps each chain had."""
    lengths = []
    run = llvm.run
    monkeypatch.setattr(llvm, "run", lambda kernels, *rest: lengths.append(len(kernels)) or run(kernels, *rest))
    return lengths
