"""On PyTorch the Triton kernels run, forward and backward, in the interpreter: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from keras_support import ON_TORCH

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys, torch, convnext_fast
from triton.runtime.interpreter import GridExecutor

launches, run_grid = [], GridExecutor.__call__

def launch(self, *args, **kwargs):
    launches.append(self)
    return run_grid(self, *args, **kwargs)

GridExecutor.__call__ = launch

def run(model):
    launches.clear()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = model(x).logits
    forward = len(launches)
    logits.square().sum().backward()
    return logits.detach(), forward, len(launches) - forward

v = sys.argv[1]
fields = {"num_stages": 2, "hidden_sizes": (8, 8), "depths": (0, 1), "layer_scale_init_value": 1.0}
config = getattr(convnext_fast, f"ConvNext{v}Config")(**fields)
ours = getattr(convnext_fast, f"ConvNext{v}ForImageClassification")(config)
ours.save_pretrained("model")
theirs = getattr(convnext_fast, f"TFConvNext{v}ForImageClassification").from_pretrained("model")
expected, found = run(ours), run(theirs)
assert torch.equal(found[0], expected[0])
assert found[1:] == expected[1:], (found[1:], expected[1:])
assert min(found[1:]) > 0
theirs.main_layer.encoder.stages[1].layers[0].pwconv1.enable_lora(1)
assert 0 < run(theirs)[1] < found[1]
print("launches", found[1:])
"""


@pytest.mark.skipif(not ON_TORCH, reason="Triton's kernels run on PyTorch alone")
@pytest.mark.parametrize("version", ["", "V2"])
def test_launches(version, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE, version]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert result.stdout.startswith("launches"), result.stderr
