"""These tests run on the backend that KERAS_BACKEND names, or PyTorch; `.ci/keras` runs them on each.

The folder is not called keras, which would be found in place of the package.
"""

import importlib.util
import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
BACKEND = os.environ["KERAS_BACKEND"]
MISSING = [name for name in ("keras", BACKEND) if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


@pytest.fixture(autouse=True)
def seed():
    import keras

    keras.utils.set_random_seed(0)
