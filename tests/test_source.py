"""What holds for every module of the package, read from its source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "convnext_fast").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
WRITES = {"write_text", "write_bytes", "save", "save_file", "savefig", "tofile", "dump", "touch"}

ELSEWHERE = {
    "convnext_fast/huggingface/hub.py": {"push"},  # a temporary folder
    "convnext_fast/training/state.py": {"lock_folder", "save_sharded_state"},  # an empty lock; a folder that is renamed
    "kernels/cpu/code_cache.py": {"_write", "_read"},  # by handle, below a folder's handle
}


def writes_in_place(tree, allowed):
    """(line, call) of everything that writes a file outside of a function for `files.write_files`."""

    def visit(node, inside):
        if isinstance(node, ast.Lambda):
            inside = True
        elif isinstance(node, ast.FunctionDef):
            inside = inside or node.name == "write" or node.name in allowed
        elif isinstance(node, ast.Call) and not inside and is_write(node):
            yield node.lineno, ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return list(visit(tree, False))


def is_write(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    if name != "open":
        return name in WRITES
    texts = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
    return any(isinstance(text, str) and set(text) <= set("rwxabt+") and set(text) & set("wxa+") for text in texts)


# In these rooms "save" is what autograd does with tensors.
WITHOUT_FILES = {ROOT / "convnext_fast" / room for room in ("ops", "backends", "models", "fusion")}


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if not WITHOUT_FILES & set(path.parents)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_are_written_whole_or_not_at_all(path):
    allowed = ELSEWHERE.get(str(path.relative_to(ROOT)), set())
    if path.name == "files.py" and path.parent.name == "convnext_fast":
        allowed = {"_create"}
    assert writes_in_place(ast.parse(path.read_text("utf-8")), allowed) == []


def test_a_write_in_place_is_seen():
    for line in ("open(p, 'w')", "p.open(mode='ab')", "p.write_text('x')", "torch.save(x, p)", "image.save(p)"):
        assert writes_in_place(ast.parse(f"def f(p):\n    {line}"), set())
    assert not writes_in_place(ast.parse("def f(p):\n    open(p, 'rb')\n    p.read_text()"), set())
