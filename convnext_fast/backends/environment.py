"""Environment variables, read once when the package is imported."""

from __future__ import annotations

import os

REQUESTS = ("auto", "triton", "aten", "reference")

REQUEST = os.environ.get("CONVNEXT_FAST_BACKEND", "auto").strip().lower() or "auto"
"""``CONVNEXT_FAST_BACKEND``: the path of the fused ops for the whole process."""

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
"""``TRITON_INTERPRET``: whether Triton's kernels run in its interpreter, on a CPU too."""


def check() -> None:
    """Reject an unknown value of ``CONVNEXT_FAST_BACKEND``; not at import, where no command could report it.

    Raises:
        ValueError: it is none of ``REQUESTS``.
    """
    if REQUEST not in REQUESTS:
        raise ValueError(f"CONVNEXT_FAST_BACKEND is {REQUEST!r}: expected one of {', '.join(REQUESTS)}")
