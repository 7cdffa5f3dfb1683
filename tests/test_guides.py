"""README and the guides: every link and anchor leads somewhere, and `.ci/run` finds its two commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = "README.md"
PAGES = (
    README,
    "kernels/README.md",
    "bench/README.md",
    "convnext_fast/keras/README.md",
    "convnext_fast/training/README.md",
    ".github/CONTRIBUTING.md",
)


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors(page):
    path = ROOT / page
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_readme_links_every_guide():
    links = re.findall(r"\]\(([^)#\s]+)", prose(ROOT / README))
    assert set(PAGES) - {README} <= set(links)


@pytest.mark.parametrize(("mark", "command"), [("demo", "convnext-fast demo"), ("tests", "python -m pytest")])
def test_ci_finds_its_commands(mark, command):
    """`.ci/run` runs the lines between these marks."""
    found = re.findall(rf"<!-- {mark} -->\n```bash\n(.+)\n```\n<!-- end -->", (ROOT / README).read_text("utf-8"))
    assert len(found) == 1
    assert command in found[0]
