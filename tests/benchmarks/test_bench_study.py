"""The study: what it plans, that it goes on after a kill, and what it writes, tables in README.md included."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_support import CPU, NAMES, ROOFLINE, measured_rows, stored, tiny_cell

from bench import environment, plan, plots, readme, report, results, startup, study
from bench.environment import ROOT
from bench.plan import Step, Study
from bench.results import Results
from bench.variants import RECIPES

KILLED = """
import sys, time
from pathlib import Path
from bench import environment, study
from bench.plan import Step
from bench.results import Results
import torch

class Lines:
    def start(self, step): pass
    def say(self, text): print(text, flush=True)
    def finish(self): pass

def rows(section):
    for i in range(2):
        yield {"key": f"{section}/{i}", "section": section, "failure": None, "at": time.time()}
        time.sleep(float(sys.argv[2]))

steps = [Step(s, s, (f"{s}/0", f"{s}/1"), lambda s=s: rows(s)) for s in "ab"]
steps.append(Step("c", "c", (), lambda: rows("c")))
results = Results(Path(sys.argv[1]), environment.facts(torch.device("cpu")))
study.follow(steps, results, Lines(), lambda: None)
"""


def test_continues_after_a_kill(tmp_path, monkeypatch, capsys):
    """Rows of finished steps stay as they are; a step that was cut short is done anew; nothing is doubled."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), "0.5"]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # results of other numbers are refused
    process = subprocess.Popen(command, cwd=ROOT, env=threads, stdout=subprocess.PIPE, text=True)
    assert [process.stdout.readline().split(":")[0] for _ in range(3)] == ["a/0", "a/1", "b/0"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {row["key"]: row["at"] for row in results.read(tmp_path)}
    assert list(before) == ["a/0", "a/1", "b/0"]
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path), "0"])
    for found in (["b", "c"], []):  # the third run has nothing to do
        exec(KILLED, {})
        assert sorted({line.split("/")[0] for line in capsys.readouterr().out.splitlines()}) == found
        after = {row["key"]: row.get("at") for row in results.read(tmp_path)}
        assert set(after) == {f"{s}/{i}" for s in "abc" for i in range(2)} | {"c/finished"}
        assert {key: after[key] for key in ("a/0", "a/1")} == {key: before[key] for key in ("a/0", "a/1")}
        assert after["b/0"] > before["b/0"]
        assert len(results.read(tmp_path)) == 7


def test_results_of_another_device_are_refused(tmp_path):
    stored(tmp_path, [{"key": "k", "section": "models", "failure": None}])
    facts = environment.facts(CPU)
    assert "k" in Results(tmp_path, facts)
    with pytest.raises(ValueError, match=r"holds results of device .*, this run is of device Other|choose another"):
        Results(tmp_path, facts | {"device": "Other"})
    (tmp_path / results.FILE).write_text("[1]")
    with pytest.raises(ValueError, match="is not a file of results"):
        Results(tmp_path, facts)


def test_every_row_says_what_it_ran_on(tmp_path):
    stored(tmp_path, [{"key": "k", "section": "models", "failure": None}])
    (row,) = results.read(tmp_path)
    assert row.keys() >= {"device", "commit", "torch", "threads", "triton", "python"}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan(device, quick):
    steps = Study(torch.device(device), lambda: ROOFLINE, quick, 1.0).steps()
    expected = plan.SECTIONS if not quick else plan.SECTIONS[:-1] if device == "cpu" else ("correctness", "models")
    assert list(expected) == list(dict.fromkeys(step.section for step in steps))
    keys = [key for step in steps for key in step.keys]
    assert len(keys) == len(set(keys))
    ran = {key.rsplit("/", 1)[1] for key in keys if key.startswith("models/")}
    possible = {name for name, recipe in RECIPES.items() if recipe.only in (None, device)}
    assert ran == {name for name in possible if RECIPES[name].quick or not quick}
    cells = {tuple(key.split("/")[1:3]) for key in keys if key.startswith("models/")}
    if quick:
        assert {variant for variant, _ in cells} == {"tiny"}
    else:
        variants = "tiny", "small", "base", "large", "v2_tiny"
        sizes = {(variant, f"{n}x224") for variant in variants for n in (1, 8, 32, 64, 128, 256)}
        assert sizes <= cells


def test_parts_of_the_plan():
    def chosen(*only):
        return Study(CPU, lambda: ROOFLINE, quick=False, budget=1.0).steps(only)

    assert [step.section for step in chosen("startup", "correctness")] == ["correctness", "startup"]
    (step,) = chosen("models/base/8x224/float32/inference")
    assert len(step.keys) > 5
    assert {step.section for step in chosen("models/base/8x224", "modelled")} == {"models", "modelled"}


def test_a_job_that_would_take_too_long_is_skipped_with_the_reason():
    slow = Study(CPU, lambda: environment.Roofline({"float32": 1.0}, 1.0, "made up"), quick=True, budget=1.0)
    rows = list(slow.model_rows(tiny_cell("inference"), NAMES, lambda: pytest.fail("prepared")))
    assert [row["contender"] for row in rows] == list(NAMES)
    assert all(row["failure"].startswith("not run: a call takes") for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study of tiny models, with a contender that failed."""
    folder = tmp_path_factory.mktemp("results") / "here"
    rows = [row for mode in ("inference", "training") for n in (1, 2) for row in measured_rows(mode, n)]
    rows[1] = {k: v for k, v in rows[1].items() if k in ("key", "section", "contender", "variant", "batch", "side")} | {
        "mode": "inference",
        "dtype": "float32",
        "failure": "OutOfMemoryError: no room",
    }
    correct = {"key": "c", "section": "correctness", "check": "against float64", "op": "o", "dtype": "float32"}
    stored(folder, [*rows, correct | {"failure": None, "passed": True, "error": 1e-7, "error_bound": 1e-5}])
    return folder


def test_report_and_plots(folder):
    report.write(folder)
    text = (folder / report.FILE).read_text()
    assert "1 of 1 checks passed" in text
    assert "OutOfMemoryError: no room" in text
    rows = [row for row in results.read(folder) if row["section"] == "models"]
    for cell in report.cells(rows).values():
        fastest = min(row["p50_ms"] for row in cell if row["contender"] != "fused" and not row["failure"])
        for row in cell:
            if row["failure"] is None:
                ratio = f"{fastest / row['p50_ms']:.2f}"
                name = "**fused**" if row["contender"] == "fused" else row["contender"]
                assert re.search(rf"\| {re.escape(name)} \| {row['p50_ms']:.2f} .*\| {ratio} \|", text)
    for name in ("throughput.png", "memory.png", "speedup.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
        assert f"({name})" in text
    assert "![](stages.png)" not in text


def test_what_is_modelled_stands_apart():
    """Modelled figures are in their own section, marked, and never in a table of measured ones."""
    row = {"key": "modelled/inference_128", "section": "modelled", "pass": "inference_128", "failure": None}
    row |= {"modelled_ms": 12.25, "limit_ms": 7.5, "earlier_ms": None, "launches": 60, "kinds": []}
    row |= environment.facts(CPU)
    text = report.text([row], [])
    before, after = text.split("## Modelled, not measured")
    assert "12.25" not in before
    assert "| inference_128 | 12.25 | 7.50 | – | 60 |" in after
    assert "Nothing in this section ran" in after


MARKED = "# Title\n\n<!-- results:  -->\n\n<!-- end -->\n\nAfter.\n"


@pytest.fixture
def pages(folder, tmp_path):
    """A folder with both pages, and results of known times in bench/results/here."""
    target = tmp_path / "bench" / "results" / "here"
    target.mkdir(parents=True)
    rows = results.read(folder)
    for name, time in (("fused", 2.5), ("eager", 10.25), ("eager channels_last", 20.0)):
        for row in rows:
            if row.get("contender") == name and not row["failure"]:
                row["p50_ms"] = time * row["batch"]
    stored(target, rows)
    for page in readme.PAGES:
        (tmp_path / page).write_text(MARKED)
    return tmp_path


def test_one_command_writes_the_tables_of_both_pages(pages):
    device = environment.facts(CPU)["device"]
    readme.update([pages / "bench/results/here"], pages)
    overview, details = (pages / "README.md").read_text(), (pages / "bench/README.md").read_text()
    assert overview.startswith("# Title\n\n<!-- results: bench/results/here -->\n")
    assert details.startswith("# Title\n\n<!-- results: results/here -->\n")
    assert "(results/here/report.md)" in details
    inference = "atto, 32², inference, batch 1, float32 | 10.2 (eager) | 2.50 (fused) | 4.10 |\n"
    training = "atto, 32², training, batch 2, float32 | 20.5 (eager) | 5.00 (fused) | 4.10 |\n"
    for line in (inference, training):
        assert re.search(rf"^\| {re.escape(device)}, \d+ threads: {re.escape(line)}", overview, re.M)
        assert f"\n| {line}" in details
    for text in (overview, details):
        assert text.endswith("<!-- end -->\n\nAfter.\n")
    readme.update([pages / "bench/results/here"], pages)
    assert ((pages / "README.md").read_text(), (pages / "bench/README.md").read_text()) == (overview, details)


def test_a_page_without_marks_or_results_from_elsewhere_change_nothing(pages, folder):
    with pytest.raises(ValueError, match="is not below"):
        readme.update([folder], pages / "bench")
    (pages / "bench/README.md").write_text("No marks.\n")
    with pytest.raises(ValueError, match=r"README.md has no single <!-- results: "):
        readme.update([pages / "bench/results/here"], pages)
    assert (pages / "README.md").read_text() == MARKED


@pytest.mark.parametrize("page", readme.PAGES)
def test_pages_agree_with_the_committed_results(page):
    """`python -m bench.study --readme FOLDER …` with the folders that the page names would change nothing."""
    path = ROOT / page
    folders = readme.named_in(path)
    assert folders
    assert path.read_text(encoding="utf-8") == readme.rewritten(path, folders, readme.PAGES[page])


def test_exit_status_reports_our_failures(tmp_path):
    def failing(**row):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        stored(folder, [{"key": "k", "section": "models", "failure": None, **row}])
        return bool(study.failed(folder))

    assert not failing(contender="fused")
    assert failing(contender="fused", failure="WrongResult: x")
    assert failing(contender="frozen + compile", failure="RuntimeError: x")
    assert not failing(contender="fused", failure="OutOfMemoryError: x")
    assert not failing(contender="compile", failure="RuntimeError: x")
    assert failing(section="correctness", passed=False)
    assert not failing(section="correctness", passed=None, failure="needs a CUDA device")


def test_wrong_use_is_refused(capsys, tmp_path):
    assert study.main(["--report", "--output", str(tmp_path / "none")]) == 1
    assert "results.json" in capsys.readouterr().err
    assert study.main(["--quick", "--only", "nothing", "--device", "cpu", "--output", str(tmp_path / "made")]) == 1
    assert "no part of the study is called 'nothing'" in capsys.readouterr().err


def test_start_up_is_measured():
    assert 0 < startup.import_seconds(1)[0] < 10
    taken = startup.calls(CPU)
    assert set(taken) == set(startup.OPS)
    assert all(found["first_call_s"] > 0 < found["cached_call_s"] for found in taken.values())


def test_pytest_benchmark_rows(tmp_path):
    """The numbers in pytest-benchmark's table are the measured ones, and each carries a whole row."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/test_kernels.py"]
    command += ["--benchmark-only", "-k", "patchify_stem", f"--benchmark-json={tmp_path / 'rows.json'}"]
    # In a worker of pytest-xdist pytest-benchmark measures nothing, and a child would take itself for one.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())["benchmarks"]
    assert {each["extra_info"]["contender"] for each in found} == {"eager", "eager channels_last", "fused"}
    for each in found:
        info = each["extra_info"]
        assert each["stats"]["median"] == pytest.approx(info["p50_ms"] / 1e3)
        assert info.keys() >= {"device", "commit", "torch", "shape", "dtype", "mode", "p20_ms", "p80_ms", "gbs"}
        assert info.keys() >= {"tflops", "of_roofline", "peak_mib", "saved_mib", "error"}


def test_step_without_keys_is_marked(tmp_path):
    step = Step("startup", "t", (), lambda: [{"key": "startup/x", "section": "startup", "failure": None}])
    held = Results(tmp_path, environment.facts(CPU))
    assert not step.finished(held)
    held.add(*step.rows())
    assert step.finished(held)


def test_colours_differ():
    for ours in (False, True):
        names = [name for name in RECIPES if plots.is_ours(name) == ours]
        assert len({plots._colour(name) for name in names}) == len(names)


def test_folders_are_named_by_device_and_date():
    assert re.fullmatch(r"[a-z0-9-]+-\d{4}-\d\d-\d\d-quick", Path(study.default_folder(CPU, True)).name)
