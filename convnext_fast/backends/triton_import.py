"""Lets Triton be imported after TensorFlow.

Both contain a copy of LLVM. TensorFlow makes its LLVM symbols visible to the whole process. If Triton is loaded later,
it registers its options with the wrong LLVM, which aborts the process. PyTorch imports Triton in optimizers and in
`torch.compile`, where this package runs no code. So an import hook makes Triton's library resolve its symbols in itself
first, if TensorFlow is there.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_LIBRARY = "triton._C.libtriton"


class _DeepBound(ExtensionFileLoader):
    """Loads a library whose symbols come from itself first."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        flags = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_NOW | os.RTLD_DEEPBIND)
        try:
            return super().create_module(spec)
        finally:
            sys.setdlopenflags(flags)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _LIBRARY or "tensorflow" not in sys.modules:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, ExtensionFileLoader):
            spec.loader = _DeepBound(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Add the hook to this process, if the dynamic linker has such a mode (glibc's has)."""
    if hasattr(os, "RTLD_DEEPBIND") and _LIBRARY not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
