"""Find the package ``sass_emulator``, which executes sm_80 machine code on CPU tensors.

It is in the folder that ``CONVNEXT_FAST_SASS_EMULATOR`` names, else in ``../shared/tools`` beside the repository.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def emulator_path() -> Path | None:
    """Folder that holds the package ``sass_emulator``, or None without the tool."""
    named = os.environ.get("CONVNEXT_FAST_SASS_EMULATOR")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "tools"
    return folder if (folder / "sass_emulator").is_dir() else None


def import_emulator() -> Any:
    """The ``sass_emulator`` module; the caller has checked ``emulator_path()``."""
    folder = str(emulator_path())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import sass_emulator

    return sass_emulator
