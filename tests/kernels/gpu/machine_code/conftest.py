"""Tests that execute compiled sm_80 machine code on CPU tensors, and tests of what the compiler makes.

The emulator is the folder ``sass_emulator`` in the path in CONVNEXT_FAST_SASS_EMULATOR, else in
``../shared/tools`` beside the repository. Under TRITON_INTERPRET=1 nothing compiles, so nothing here is collected.
"""

import os

import pytest
import torch

from bench.static_analysis.emulator import emulator_path, import_emulator

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def emulating():
    """``sass_emulator.emulating``: a context in which launches on CPU tensors execute sm_80 machine code."""
    if emulator_path() is None:
        pytest.skip("sass_emulator not found: set CONVNEXT_FAST_SASS_EMULATOR to the folder that holds it")
    return import_emulator().emulating


@pytest.fixture(params=["ieee", "tf32"])
def precision(request):
    """float32 products with and without TF32, which PyTorch's switch allows."""
    switch = torch.backends.cuda.matmul
    before, switch.allow_tf32 = switch.allow_tf32, request.param == "tf32"
    yield request.param
    switch.allow_tf32 = before
