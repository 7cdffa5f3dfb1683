"""Settings of the whole suite."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The same random numbers for a test whatever ran before it in its process."""
    torch.manual_seed(0)
