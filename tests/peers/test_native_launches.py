"""What C launches a recorded call with, against Triton's own launcher, on a GPU that does nothing.

``hollow_gpu`` is a folder under the path in CONVNEXT_FAST_HOLLOW_GPU, else under ``../shared/tools`` beside the
repository.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture
def hollow_gpu():
    """The folder of ``hollow_gpu``."""
    folder = Path(os.environ.get("CONVNEXT_FAST_HOLLOW_GPU", HERE.parents[2] / "shared" / "tools")) / "hollow_gpu"
    if not folder.is_dir():
        pytest.skip("hollow_gpu not found: set CONVNEXT_FAST_HOLLOW_GPU to the folder that holds it")
    if torch.version.cuda is None or shutil.which("gcc") is None or not list(Path("/usr/local").glob("cuda*/include")):
        pytest.skip("needs a CUDA build of PyTorch, gcc and CUDA's headers")
    return folder


def test_launches_are_those_of_triton(hollow_gpu, tmp_path):
    include = max(Path("/usr/local").glob("cuda*/include"))
    libraries = {"hollow_cudart.so": hollow_gpu / "hollow_cudart.c", "libcuda.so.1": HERE / "recording_driver.c"}
    for name, source in libraries.items():
        compiler = ["gcc", "-O2", "-w", "-shared", "-fPIC", f"-I{include}", f"-I{hollow_gpu}"]
        subprocess.run([*compiler, f"-Wl,-soname,{name}", "-o", str(tmp_path / name), str(source), "-ldl"], check=True)
    run = subprocess.run(
        [str(hollow_gpu / "run"), str(HERE / "launches_compared.py")],
        env={**os.environ, "HOLLOW_PYTHON": sys.executable, "HOLLOW_BUILD": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"compared (\d+) launches", run.stdout)[1]) > 100
