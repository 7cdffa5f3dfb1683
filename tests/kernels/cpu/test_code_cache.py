"""The cache of compiled kernels: its code is run, so it has to be this user's own and complete."""

from __future__ import annotations

import os
import stat
import warnings
from unittest import mock

import pytest
from convnext_fast.kernels.cpu import code_cache


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The cache's folder, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code_cache._warn.cache_clear()
    return tmp_path / "cache" / "convnext_fast"


class Compiler:
    """Compiles "a" to b"code of a", and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, name):
        def compile_():
            self.asked.append(name)
            return f"code of {name}".encode()

        return code_cache.code_for(name, compile_)


@pytest.fixture
def code():
    return Compiler()


def entries(place):
    return sorted(place.iterdir())


def test_compiled_once(place, code):
    assert [code(name) for name in "aba"] == [b"code of a", b"code of b", b"code of a"]
    assert code.asked == ["a", "b"]
    assert len(entries(place)) == 2


def test_nobody_else_may_write(place, code):
    before = os.umask(0)
    try:
        code("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert [stat.S_IMODE(entry.stat().st_mode) for entry in entries(place)] == [0o600]


def empty(content):
    """No code, and its digest without the key."""
    return code_cache.hashlib.sha256(b"").digest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"more",
        lambda content: content[:32],
        lambda content: b"",
        lambda content: code_cache.hashlib.sha256(b"evil").digest() + b"evil",
        empty,
    ],
)
def test_a_damaged_or_foreign_entry_is_rebuilt(place, code, damage):
    code("a")
    (entry,) = entries(place)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert code("a") == b"code of a"
    assert code.asked == ["a", "a"]
    assert entry.read_bytes() == whole


def test_swapped_entries_are_rebuilt(place, code):
    code("a"), code("b")
    first, second = entries(place)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert [code(name) for name in "ab"] == [b"code of a", b"code of b"]
    assert code.asked == ["a", "b", "a", "b"]
    assert (first.read_bytes(), second.read_bytes()) == contents


def test_empty_code_is_never_kept_for_good(place):
    assert code_cache.code_for("a", lambda: b"") == b""
    assert code_cache.code_for("a", lambda: b"code") == b"code"


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_to(place, code, mode):
    code("a")
    place.chmod(mode)
    with pytest.warns(RuntimeWarning, match="others may write to it: kernels are compiled anew"):
        assert code("a") == b"code of a"
    assert code("b") == b"code of b"
    assert code.asked == ["a", "a", "b"]
    assert len(entries(place)) == 1


def test_a_folder_of_another_user(place, code, monkeypatch):
    code("a")
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert code("a") == b"code of a"
    assert code.asked == ["a", "a"]


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_an_entry_that_others_may_write_to(place, code, mode):
    code("a")
    (entry,) = entries(place)
    entry.chmod(mode)
    with pytest.warns(RuntimeWarning, match="others may write to it: rebuilt"):
        assert code("a") == b"code of a"
    assert code.asked == ["a", "a"]
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


def test_an_entry_that_is_a_link(place, code, tmp_path):
    code("a")
    (entry,) = entries(place)
    (tmp_path / "elsewhere").write_bytes(entry.read_bytes())
    entry.unlink()
    entry.symlink_to(tmp_path / "elsewhere")
    assert code("a") == b"code of a"
    assert code.asked == ["a", "a"]
    assert not entry.is_symlink()


@pytest.mark.parametrize("chosen", ["", "relative", "~/cache", "."])
def test_a_relative_folder_is_ignored(chosen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", chosen)
    assert code_cache.folder() == tmp_path / "home" / ".cache" / "convnext_fast"


def test_a_relative_home_is_no_place(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "home")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert code("a") == code("a") == b"code of a"
    assert code.asked == ["a", "a"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocked", ["/dev/null/no/folder", "/proc"])
def test_no_folder_can_be_made(blocked, code, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", blocked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code("a") == code("a") == b"code of a"
    assert code.asked == ["a", "a"]


def test_a_full_disk(place, code):
    code("a")
    with mock.patch.object(os, "replace", side_effect=OSError("no space")):
        assert code("b") == b"code of b"
    assert len(entries(place)) == 1
