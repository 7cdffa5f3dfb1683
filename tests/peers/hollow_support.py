"""Run scripts on ``hollow_gpu``, a CUDA driver that does nothing: a CUDA PyTorch launches, and nothing is computed.

It is a folder under the path in CONVNEXT_FAST_HOLLOW_GPU, else under ``../shared/tools`` beside the repository.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(folder, script, *arguments, driver=None):
    """What ``script`` prints; ``folder``: for the libraries; ``driver``: C source to use instead of hollow_gpu's."""
    tool = Path(os.environ.get("CONVNEXT_FAST_HOLLOW_GPU", ROOT.parent / "shared" / "tools")) / "hollow_gpu"
    if not tool.is_dir():
        pytest.skip("hollow_gpu not found: set CONVNEXT_FAST_HOLLOW_GPU to the folder that holds it")
    includes = [path for path in sorted(Path("/usr/local").glob("cuda*/include")) if (path / "cuda.h").exists()]
    if torch.version.cuda is None or shutil.which("gcc") is None or not includes:
        pytest.skip("needs a CUDA build of PyTorch, gcc and CUDA's headers")
    sources = {"hollow_cudart.so": tool / "hollow_cudart.c", "libcuda.so.1": driver or tool / "hollow_cuda.c"}
    for name, source in sources.items():
        options = ["-O2", "-w", "-shared", "-fPIC", f"-I{includes[-1]}", f"-I{tool}", f"-Wl,-soname,{name}"]
        subprocess.run(["gcc", *options, "-o", str(folder / name), str(source), "-ldl"], check=True)
    environment = {"HOLLOW_PYTHON": sys.executable, "HOLLOW_BUILD": str(folder), "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [str(tool / "run"), str(HERE / "hollow_main.py"), str(script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
