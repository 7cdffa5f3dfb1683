"""These tests need large libraries and therefore their own environment, which ``.ci/run`` makes in stage 4."""

import importlib.util

import pytest

NEEDED = ("timm", "torchvision")
"""The packages for files that have no ``NEEDED`` of their own."""


def pytest_collection_modifyitems(items):
    """Skip, with the reason, where the libraries are missing."""
    for item in items:
        if "peers" in item.path.parts:
            needed = getattr(item.module, "NEEDED", NEEDED)
            missing = [name for name in needed if importlib.util.find_spec(name) is None]
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}: stage 4 of .ci/run has them"))
