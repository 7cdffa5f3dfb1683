"""What is installed, what an import brings in, and the environment variable."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fresh import python

from convnext_fast.backends.cpu import llvm

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_holds_only_our_packages(tmp_path):
    # A copy, for a build in the repository takes what an earlier one left in build/.
    ignored = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", "tests", "bench")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"convnext_fast"}
    native = {f"convnext_fast/kernels/native_{name}.c" for name in ("key", "plan")}
    assert {"convnext_fast/py.typed", *native} <= set(names)
    sources = {f"convnext_fast/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    sources |= {str(p.relative_to(ROOT)) for p in (ROOT / "convnext_fast").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_import_loads_no_heavy_modules():
    code = (
        "import sys, convnext_fast\n"
        "heavy = ['triton', 'llvmlite', 'transformers', 'huggingface_hub', 'rich', 'sklearn', 'torchvision']\n"
        "heavy += ['torch._dynamo', 'keras', 'tensorflow', 'jax', 'h5py']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = python(code, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_keras_classes_say_what_they_need():
    code = "import sys; sys.modules['keras'] = None\nimport convnext_fast\nconvnext_fast.TFConvNextModel"
    result = python(code)
    assert "ImportError: the TFConvNext classes need Keras: pip install -e '.[tensorflow]'" in result.stderr
    assert "KERAS_BACKEND=torch or jax" in result.stderr


def test_no_top_level_kernels():
    result = python("import convnext_fast, sys; print('kernels' in sys.modules)")
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("request_", "path"), [("auto", None), ("", None), ("ATen", "aten"), ("reference", "reference")]
)
def test_environment_chooses_the_path(request_, path):
    path = path or ("cpu" if llvm.serves_block(8, 32, "gelu") else "aten")
    code = (
        "import torch, convnext_fast as c\n"
        "m = c.ConvNext(c.ConvNextConfig(num_stages=1, hidden_sizes=[8], depths=[1]))\n"
        "x = torch.randn(1, 3, 32, 32)\n"
        "print(m.backend_for(x), tuple(m(x).shape))"
    )
    result = python(code, CONVNEXT_FAST_BACKEND=request_)
    assert result.stdout.strip() == f"{path} (1, 2)", result.stderr


def test_environment_rejects_unknown_values():
    code = (
        "import torch, convnext_fast as c\n"
        "c.ConvNext(c.ConvNextConfig(num_stages=1, hidden_sizes=[8], depths=[1]))(torch.randn(1, 3, 32, 32))"
    )
    result = python(code, CONVNEXT_FAST_BACKEND="cuda")
    assert "CONVNEXT_FAST_BACKEND is 'cuda': expected one of auto, triton, aten, reference" in result.stderr


def test_public_names_are_documented():
    import convnext_fast

    for name in convnext_fast.__all__:
        thing = getattr(convnext_fast, name)
        assert name.startswith("__") or name == "VARIANTS" or (thing.__doc__ and len(thing.__doc__) > 40), name
