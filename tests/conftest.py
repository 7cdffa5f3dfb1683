"""Settings of the whole suite."""

import getpass
import os
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Inductor's cache gives out code for vectors of another length, which ATEN_CPU_CAPABILITY asked for before: it writes
# over memory.
_compiled = f"convnext_fast_inductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / _compiled))
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The same random numbers and an empty compiler for a test, whatever ran before it in its process."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # Dynamo keeps which code it gave up compiling
        torch.compiler.reset()


class _TorchRandom:
    """PyTorch's random numbers, as Hypothesis wants them: so that each example has the same ones again."""

    seed, getstate, setstate = map(staticmethod, (torch.manual_seed, torch.get_rng_state, torch.set_rng_state))


RANDOM = _TorchRandom()
hypothesis.register_random(RANDOM)
