"""Compiled kernels on disk, in the user's cache folder, so that a process finds what another one compiled.

An entry is a digest of its key and its code, then the code. The code runs with the user's rights. So the folder and its
entries must belong to this user, and nobody else may be able to write to them. An entry that is damaged, or that is of
another key, is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

_DIGEST_BYTES = 32


def folder() -> Path:
    """``$XDG_CACHE_HOME/convnext_fast``, by default ``~/.cache/convnext_fast``.

    A relative ``XDG_CACHE_HOME`` is ignored, as the XDG Base Directory Specification asks.

    Raises:
        RuntimeError: this user's home folder is not known.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    parent = chosen if chosen.is_absolute() else Path.home() / ".cache"
    if not parent.is_absolute():
        raise RuntimeError(f"the home folder is {Path.home()}: expected an absolute path")
    return parent / "convnext_fast"


def code_for(description: str, compile_: Callable[[], bytes]) -> bytes:
    """The code for ``description`` and the source of this package: from the cache, or compiled."""
    source, place = _source_digest(), _open_folder()
    if source is None or place is None:
        return compile_()
    key = hashlib.sha256(f"{source} {description}".encode())
    try:
        code = _read(place, key.hexdigest(), key.digest())
        if code is None:
            code = compile_()
            _write(place, key.hexdigest(), _digest(key.digest(), code) + code)
        return code
    finally:
        os.close(place)


def _open_folder() -> int | None:
    """A handle of the folder, which is created if it is missing; None if it cannot be used or trusted."""
    try:
        path = folder()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (OSError, RuntimeError):  # the disk is read-only or full, or this user has no home
        return None
    if _is_private(handle):
        return handle
    os.close(handle)
    _warn(
        f"{path} belongs to another user, or others may write to it: kernels are compiled anew for this process and "
        "not kept. Expected a folder of this user's with mode 0700"
    )
    return None


def _read(place: int, name: str, key: bytes) -> bytes | None:
    """The code of an entry; None if it is missing or cannot be trusted."""
    try:
        with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=place), "rb") as file:
            if not _is_private(file.fileno()):
                _warn(f"the entry {name} of {folder()} belongs to another user, or others may write to it: rebuilt")
                return None
            content = file.read()
    except OSError:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if code and digest == _digest(key, code) else None


def _write(place: int, name: str, content: bytes) -> None:
    """Make or replace an entry atomically. If that fails, the next process compiles it again."""
    temporary = f".{name}.{secrets.token_hex(4)}.tmp"
    with contextlib.suppress(OSError):
        try:
            created = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=place)
            with open(created, "wb") as file:
                file.write(content)
            os.replace(temporary, name, src_dir_fd=place, dst_dir_fd=place)
        except OSError:
            os.unlink(temporary, dir_fd=place)


def _digest(key: bytes, code: bytes) -> bytes:
    return hashlib.sha256(key + code).digest()


def _is_private(handle: int) -> bool:
    """Whether an open file or folder is this user's, and nobody else may write to it."""
    found = os.fstat(handle)
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def _warn(text: str) -> None:
    """Warn, once per process."""
    warnings.warn(text, RuntimeWarning, stacklevel=5)


@functools.cache
def _source_digest() -> str | None:
    """None if the source cannot be read."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return None if not files else hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
