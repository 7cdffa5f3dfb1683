"""What the environment asks for, read once when the package is imported."""

from __future__ import annotations

import os

REQUESTS = ("auto", "triton", "aten", "reference")


def _read() -> str:
    request = os.environ.get("CONVNEXT_FAST_BACKEND", "auto").strip().lower() or "auto"
    if request not in REQUESTS:
        raise ValueError(f"CONVNEXT_FAST_BACKEND is {request!r}: expected one of {', '.join(REQUESTS)}")
    return request


REQUEST = _read()
"""``CONVNEXT_FAST_BACKEND``: the path of the fused ops for the whole process."""
