"""`bench.gpu_day` without a GPU: the steps' processes, their limits, and what becomes of what they measured."""

import json
import sys

import pytest
import torch
from bench_support import CPU, stored

from bench import environment, gpu_day, gpu_report, gpu_steps, graphs, report, results

NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","_fc1_kernel","GPU Speed Of Light Throughput","Duration","us","71.2"
"0","_fc1_kernel","GPU Speed Of Light Throughput","DRAM Throughput","%","31.5"
"0","_fc1_kernel","GPU Speed Of Light Throughput","","",""
"1","_fc2_kernel","GPU Speed Of Light Throughput","Duration","us","80.1"
"""


def test_steps_come_in_order_and_fit_the_time():
    names = [step.name for step in gpu_steps.STEPS]
    assert names[:4] == ["rates", "correctness", "kernels", "host"]
    assert names[-3:] == ["counters", "max-autotune", "headline"]
    assert sum(step.limit for step in gpu_steps.STEPS) <= gpu_day.LONGEST == 720


@pytest.fixture
def _on_a_cpu(monkeypatch):
    facts = environment.facts(CPU)
    monkeypatch.setattr(environment, "facts", lambda device: facts)


@pytest.mark.usefixtures("_on_a_cpu")
def test_a_stop_or_an_error_loses_nothing(tmp_path, monkeypatch):
    code = f"""
import json, sys, time
from pathlib import Path
sys.path.insert(0, {str(environment.ROOT)!r})
from bench.results import Results
name, folder = sys.argv[1], Path(sys.argv[2])
facts = json.loads({json.dumps(environment.facts(CPU))!r})
Results(folder, facts).add(dict(key="made/" + name, section="made up", failure=None))
if name == "slow":
    time.sleep(60)
if name == "wrong":
    raise ValueError("no such thing")
"""
    script = tmp_path / "step.py"
    script.write_text(code)
    monkeypatch.setattr(gpu_day, "COMMAND", (sys.executable, str(script)))
    folder = tmp_path / "results"
    steps = [
        gpu_steps.Step(name, limit, lambda device: ()) for name, limit in (("slow", 5), ("wrong", 60), ("good", 60))
    ]
    assert gpu_day.follow(steps, folder, 200) is False
    rows = {row["key"]: row for row in results.read(folder)}
    assert {"made/slow", "made/wrong", "made/good"} <= rows.keys()
    assert rows["steps/slow"]["failure"] == "stopped: over its 5 s"
    assert rows["steps/wrong"]["failure"] == "ValueError: no such thing"
    assert rows["steps/good"]["failure"] is None
    assert "stopped: over its 5 s" in (folder / report.FILE).read_text()
    assert gpu_day.follow(steps[2:], folder, 0) is False
    assert {row["key"]: row for row in results.read(folder)}["steps/good"]["failure"].startswith("not run")


def test_kernels_by_their_place_in_a_replay():
    events = [
        ("b", 20.0, 5.0),
        ("a", 10.0, 1.0),
        ("a", 30.0, 3.0),
        ("b", 40.0, 7.0),
        ("a", 50.0, 2.0),
        ("b", 60.0, 6.0),
    ]
    assert graphs.in_order(events, 3) == [("a", 2.0), ("b", 6.0)]
    with pytest.raises(RuntimeError, match="5 kernels in 3 replays"):
        graphs.in_order(events[1:], 3)
    with pytest.raises(RuntimeError, match="0 kernels"):
        graphs.in_order([], 3)


def test_counters_of_ncu():
    first, second = gpu_steps.counter_rows(NCU)
    assert first["kernel"] == "_fc1_kernel"
    assert first["metrics"] == {"Duration": "71.2 us", "DRAM Throughput": "31.5 %"}
    assert second["metrics"] == {"Duration": "80.1 us"}
    assert list(gpu_steps.counter_rows("==ERROR== no permission")) == []


def kind(kernel, shape, places, microseconds, programs=4):
    return {"kernel": kernel, "shape": shape, "programs": programs, "places": places, "limit": 1.0} | {
        "microseconds": microseconds,
        "bounds": {"dram": 1.0, "l2": 2.0},
    }


def test_measured_kernels_stand_beside_the_model():
    model = {"kinds": [kind("_fc1_kernel", "96", [0, 2], 11.0), kind("_fc1_kernel", "192", [1], 21.0)]}
    model["kinds"].append(kind("aten::mean", "", [3], 1.0, programs=0))
    measured = [("_fc1_kernel", 10.0), ("_fc1_kernel", 20.0), ("_fc1_kernel", 12.0), ("reduce", 3.0)]
    row = {"pass": "p", "failure": None, "p50_ms": 1.0, "kernels_us": 45.0, "section": "kernels", "kernels": measured}
    text = "\n".join(gpu_report.sections([row, model | {"pass": "p", "failure": None, "section": "modelled"}]))
    assert "| _fc1_kernel | 96 | 2 | 11.0 | 11.0 | 1.0 | l2 |" in text
    assert "| _fc1_kernel | 192 | 1 | 20.0 | 21.0 | 1.0 | l2 |" in text
    assert "| reduce |  | 1 | 3.0 |  |  |  |" in text
    row["kernels"] = measured[1:]
    text = "\n".join(gpu_report.sections([row, model | {"pass": "p", "failure": None, "section": "modelled"}]))
    assert "not those that the model recorded" in text
    assert "| _fc1_kernel |  | 2 | 16.0 |  |  |  |" in text


def test_a_report_models_what_is_missing(tmp_path, monkeypatch, capsys):
    measured = {"section": "kernels", "failure": None, "p50_ms": 1.0, "kernels_us": 10.0}
    measured |= {"kernels": [["_fc1_kernel", 10.0]]}
    found = [measured | {"key": f"kernels/{name}", "pass": name} for name in ("a", "b")]
    model = {"failure": None, "modelled_ms": 2.0, "limit_ms": 1.0, "earlier_ms": None, "launches": 1}
    model |= {"kinds": [kind("_fc1_kernel", "96", [0], 11.0)], "section": "modelled"}
    stored(tmp_path, [*found, model | {"key": "modelled/a", "pass": "a"}])
    asked = []

    def row(name):
        asked.append(name)
        return model | {"key": f"modelled/{name}", "pass": name}

    monkeypatch.setattr(gpu_day.modelled, "row", row)
    assert gpu_day.main(["--report", "--output", str(tmp_path)]) == 0
    assert asked == ["b"]
    assert (tmp_path / report.FILE).read_text().count("| _fc1_kernel | 96 | 1 | 10.0 | 11.0 |") == 2
    assert gpu_day.main(["--report", "--output", str(tmp_path / "none")]) == 1
    assert "results.json" in capsys.readouterr().err


def test_a_report_without_matplotlib(tmp_path, monkeypatch):
    stored(tmp_path, [{"key": "k", "section": "steps", "step": "rates", "took_s": 1.0, "failure": None}])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.write(tmp_path)
    assert "There are no plots: plots need matplotlib" in (tmp_path / report.FILE).read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu_day.main([])
    assert "needs a GPU" in capsys.readouterr().err
