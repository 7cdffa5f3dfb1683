"""TensorFlow and Triton in one process, whichever is imported first: each in a process of its own, for it may abort."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs tensorflow: .ci/keras has it"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
ROOT = Path(__file__).resolve().parents[1]

# In a file, for Triton reads the source of its kernels.
WORK = """
import sys, torch, triton, triton.language as tl

@triton.jit
def double(x, y):
    i = tl.arange(0, 64)
    tl.store(y + i, 2 * tl.load(x + i))

def triton_works():
    source = triton.compiler.ASTSource(double, signature={"x": "*fp32", "y": "*fp32"})
    assert "st.global" in triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 80, 32)).asm["ptx"]

def tensorflow_works():
    import tensorflow as tf
    twice = tf.function(lambda x: tf.tanh(x) * 2, jit_compile=True)
    assert float(twice(tf.zeros(()))) == 0

def training_works():
    import convnext_fast
    model = convnext_fast.ConvNext(convnext_fast.ConvNextConfig(num_stages=2, hidden_sizes=(8, 16), depths=(1, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
"""
IMAGE = "convnext_fast.ConvNextImageProcessor(size=16)(np.zeros((16, 16, 3), np.uint8), return_tensors='tf')"


@pytest.mark.parametrize(
    "imports",
    [
        "import tensorflow, convnext_fast",
        "import convnext_fast, tensorflow",
        f"import convnext_fast, numpy as np; {IMAGE}",
        "import convnext_fast, triton, tensorflow",
    ],
)
def test_triton_beside_tensorflow(imports, tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    calls = "work.triton_works(), work.tensorflow_works(), work.training_works()"
    code = f"{imports}\nimport sys; assert 'tensorflow' in sys.modules\nimport work\n{calls}; print('done')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.anchor, env=environment
    )
    assert result.stdout.strip().endswith("done"), f"exit {result.returncode}: {result.stderr[-2000:]}"
