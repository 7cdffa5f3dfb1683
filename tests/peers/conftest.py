"""These tests need torchvision, and so an environment of their own: ``.ci/run`` makes it in its fourth stage."""

import importlib.util

import pytest

NEEDED = ("timm", "torchvision")


def pytest_collection_modifyitems(items):
    """Skip, with the reason, where the libraries are missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        for item in items:
            if "peers" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}: stage 4 of .ci/run has them"))
