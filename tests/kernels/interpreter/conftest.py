"""Tests of the kernels in Triton's interpreter, which must be chosen before Triton is imported.

Run them in a process of their own: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreter``. Elsewhere nothing here is
collected.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
