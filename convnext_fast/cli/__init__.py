"""The command ``convnext-fast``."""

from .commands import main

__all__ = ["main"]
