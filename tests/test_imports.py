"""Imports go one way: the rooms of the package in order, no circle between modules, none hidden in a function."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "convnext_fast"
MAY_IMPORT = {
    "files": set(),
    "console": set(),
    "measuring": set(),
    "huggingface": {"files", "console"},
    "config": {"huggingface", "files"},
    "checkpoints": {"config", "huggingface", "files", "console"},
    "images": {"config", "huggingface", "files"},
    "kernels": set(),
    "backends": {"kernels"},
    "ops": {"backends", "kernels", "config"},
    "models": {"ops", "backends", "kernels", "checkpoints", "config", "huggingface", "files"},
    "keras": {"models", "ops", "checkpoints", "config", "huggingface", "files", "console"},
    "fusion": {"models", "ops", "backends", "kernels"},
    "training": {"models", "checkpoints", "images", "config", "files", "console"},
}
MAY_IMPORT["cli"] = {*MAY_IMPORT}
"""What each room of the package, a folder or a file, may import besides itself."""


def modules():
    """Path and dotted name of every source file."""
    for folder in (ROOT / PACKAGE, ROOT / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = (PACKAGE, *parts) if parts[0] == "kernels" else parts
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name: path for path, name in modules()}


def imported_by(name):
    """The modules of this package that ``name`` imports, at its top or inside a function."""
    path = NAMES[name]
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*start, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                if f"{source}.{alias.name}" in NAMES:
                    yield f"{source}.{alias.name}"
                elif source in NAMES:
                    yield source


def room(name):
    """The folder, or the file of the first level; "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


def test_rooms_import_in_one_order():
    wrong = []
    for name in NAMES:
        here = room(name)
        for other in imported_by(name):
            there = room(other)
            if here in ("", "__main__") or there == here:
                continue
            if there not in MAY_IMPORT[here] and not (here == "cli" and other == PACKAGE):
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_circles():
    """Also not through imports inside functions: those are for start-up time alone."""
    done, stack = set(), []

    def visit(name):
        assert name not in stack, " → ".join([*stack[stack.index(name) :], name])
        if name not in done:
            stack.append(name)
            for other in imported_by(name):
                if other != PACKAGE:
                    visit(other)
            done.add(stack.pop())

    for name in NAMES:
        visit(name)


def test_kernels_register_no_operator():
    for path, name in modules():
        if room(name) == "kernels":
            text = path.read_text()
            assert "custom_op(" not in text, path
            assert "triton_op(" not in text, path
