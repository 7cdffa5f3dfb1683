"""Images of many sizes: what is kept for each size takes no more memory than eager PyTorch's own caches."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import gc, sys, torch
from convnext_fast import ConvNext, ConvNextConfig

kind = sys.argv[1]
torch.set_num_threads(1)
model = ConvNext(ConvNextConfig(num_stages=2, hidden_sizes=[32, 64], depths=[2, 2], num_labels=3)).eval()
model.fused = kind in ("training", "frozen")
if kind == "frozen":
    model.freeze()

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def step(height, width):
    images = torch.randn(1, 3, height, width)
    if kind in ("frozen", "eager inference"):
        with torch.no_grad():
            model(images)
    else:
        model(images).sum().backward()

step(160, 160)
before = resident()
for height in range(32, 160, 8):
    for width in range(32, 160, 8):
        step(height, width)
print(resident() - before)
"""


def growth(kind):
    run = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("ours", "eager"), [("training", "eager training"), ("frozen", "eager inference")])
def test_memory_grows_no_faster_than_eager_pytorchs(ours, eager):
    assert growth(ours) <= max(growth(eager), 8 << 20)
