"""transformers' own common tests, run on our classes: only the tests listed here fail, each with a reason.

The tests are in transformers' source distribution on PyPI, which pip downloads; without it this test is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

NEEDED = ("accelerate", "parameterized")
ROOT = Path(__file__).resolve().parents[2]
_OWN_CHECKPOINTING = "it looks for transformers' GradientCheckpointingLayer; stages recompute their blocks here"
_COMPLETELY = "here a checkpoint that does not fit is a ValueError"
KNOWN = {
    "test_can_load_ignoring_mismatched_shapes": _COMPLETELY,
    "test_model_weights_reload_no_missing_tied_weights": _COMPLETELY,
    "test_cannot_load_with_meta_device_context_manager": "here that is a ValueError",
    "test_config_attn_implementation_setter": "there is no attention to choose",
    "test_gradient_checkpointing_enable_disable": _OWN_CHECKPOINTING,
    "test_training_gradient_checkpointing": _OWN_CHECKPOINTING,
    "test_training_gradient_checkpointing_use_reentrant_false": _OWN_CHECKPOINTING,
    "test_training_gradient_checkpointing_use_reentrant_true": _OWN_CHECKPOINTING,
}
"""The tests that fail, and why."""
# Modules that the common tests import but the source distribution lacks; our classes need none of them.
STUBS = {
    "tests/__init__.py": "",
    "tests/models/__init__.py": "",
    "tests/models/convnext/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: pass",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: all_generative_model_classes = ()",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'dtype': 'float16', "
        "'architectures': ['A'], 'id2label': {0: 'a'}, 'label2id': {'a': 0}, 'problem_type': 'regression', "
        "'chunk_size_feed_forward': 5, 'is_encoder_decoder': True}"
    ),
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url, **options): raise FileNotFoundError(url)",
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A folder with transformers' common tests."""
    folder = tmp_path_factory.mktemp("suite")
    wanted = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers", wanted]
    done = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not archives:
        pytest.skip(f"pip cannot download the source distribution of {wanted}: {done.stderr[-300:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    root = next(path for path in folder.iterdir() if path.is_dir())
    for name, text in STUBS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n    generate\n    flash_attn_test\n")
    return root


def test_common_tests(suite):
    place = suite / "tests/models/convnext/test_ours.py"
    place.write_text((ROOT / "tests/peers/transformers_suite.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "--junitxml=found.xml"]
    ran = subprocess.run(
        [*command, str(place.relative_to(suite))],
        cwd=suite,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (suite / "found.xml").is_file(), ran.stdout[-3000:] + ran.stderr[-3000:]
    cases = list(ElementTree.parse(suite / "found.xml").iter("testcase"))
    failed = {}
    for case in cases:
        for outcome in (*case.iter("failure"), *case.iter("error")):
            failed[case.get("name")] = outcome.get("message")
    assert len(cases) > 100, ran.stdout[-3000:]
    new = {name: reason for name, reason in failed.items() if name not in KNOWN}
    assert not new, "\n".join(f"{name}: {str(reason)[:200]}" for name, reason in sorted(new.items()))
    assert not KNOWN.keys() - failed.keys(), "these pass now: take them out of KNOWN"
