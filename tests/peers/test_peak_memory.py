"""Peak resident memory of a training step on a CPU, ours and timm's, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("timm")

STEP = """
import json, sys
import torch

name, layout = sys.argv[1:]
torch.manual_seed(0)
if name == "timm":
    import timm

    model = timm.create_model("convnext_atto", num_classes=10)
else:
    import convnext_fast.ops.operators
    from convnext_fast import ConvNext

    model = ConvNext("atto", num_classes=10)
    model.recompute = int(name)
model.train().to(memory_format=getattr(torch, layout))


def step(size, images):
    x = torch.randn(images, 3, size, size).contiguous(memory_format=getattr(torch, layout))
    loss = model(x).square().mean()
    loss.backward()


def memory(field):
    with open("/proc/self/status") as file:  # getrusage would count what the parent held when it forked
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


step(32, 1)  # what libraries allocate once, and the gradients
before = memory("VmRSS:")
step(224, 8)
print(json.dumps(memory("VmHWM:") - before))
"""

# Tensors of 64 KiB and more are pages of their own, which go back when the tensor dies. Without this, glibc adapts its
# threshold to what was freed, and holes in its heap add 25 MB to a step in one run and nothing in the next.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak(name, layout):
    """Bytes beyond those held before the step."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, name, layout],
        env=os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_a_training_step_needs_less_memory_than_eager():
    """ConvNeXt-atto, 8 images of 224², float32: at each level of recompute against the better of timm's layouts."""
    theirs = min(peak("timm", layout) for layout in ("contiguous_format", "channels_last"))
    ratios = {level: peak(level, "channels_last") / theirs for level in ("0", "1", "2")}
    # Five runs: timm 267 MB (the better layout), ours 0.55, 0.28 and 0.24 of it, within 0.001.
    assert ratios["0"] < 0.65, ratios
    assert ratios["1"] < 0.33, ratios
    assert ratios["2"] < 0.28, ratios
