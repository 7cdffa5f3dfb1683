"""`bench.gpu_day` on a GPU that does nothing: every step runs to its end, to find mistakes before a real run."""

import json

import hollow_support

from bench import gpu_steps, results

SAID = {"models", "kernels", "host", "variants", "correctness", "chip", "rates"}
"""Sections of rows that must be there. Counters need ncu and so a real device."""


def test_every_step_runs(tmp_path):
    folder = tmp_path / "results"
    printed = hollow_support.run(tmp_path, hollow_support.HERE / "gpu_day_driver.py", str(folder))
    errors = json.loads(printed.splitlines()[-1])
    assert errors.pop("counters", "").splitlines()[-1:] in ([], [f"FileNotFoundError: {gpu_steps.NO_NCU}"])
    assert errors == {}
    rows = results.read(folder)
    assert {row["section"] for row in rows} >= SAID
    expected = ("needs 1073741824 GiB",)
    failures = {row["key"]: row["failure"] for row in rows if row["failure"]}
    assert {key: why for key, why in failures.items() if not why.startswith(expected)} == {}
    text = (folder / "report.md").read_text()
    assert all(title in text for title in ("## Each kernel in a CUDA graph", "## Variants of the kernels", "## Models"))
