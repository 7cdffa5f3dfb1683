"""What `bench.host` does without a GPU."""

import functools

import pytest

from bench import host


def test_a_ratio_needs_something_eager():
    with pytest.raises(ValueError, match="the contenders are fused, frozen: expected an eager one"):
        host.rows("atto", "inference", ("fused", "frozen"), 1)


def test_the_table_shows_times_and_failures():
    timed = {"mode": "inference", "failure": None, "ms": 1.234, "of_best_eager": 0.5, "launches": 55.0, "graphs": 0.0}
    rows = [timed | {"contender": "frozen"}, {"mode": "training", "contender": "compile", "failure": "OSError: no"}]
    lines = host.table(rows).splitlines()
    assert lines[2:] == [
        "| inference | frozen | 0.50 | – | 1.23 | 55 | 0 |",
        "| training | compile | OSError: no | – | – | – | – |",
    ]


def test_the_plot_has_a_bar_for_each_contender(tmp_path):
    row = {"mode": "inference", "contender": "frozen", "failure": None, "of_best_eager": 0.5}
    host.draw([row, row | {"contender": "eager", "of_best_eager": 1.0}], tmp_path / "host.png")
    assert (tmp_path / "host.png").read_bytes()[:4] == b"\x89PNG"


def test_a_compiled_model_is_compared_with_the_best_compiled_one(monkeypatch):
    clock, speeds = (
        [0.0],
        {"eager": 4.0, "compile": 2.0, "compile transformers": 3.0, "compile fused": 1.0, "fused": 0.5},
    )
    monkeypatch.setattr(host.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(host.torch.cuda, "synchronize", lambda: None)

    def step(seconds):
        clock[0] += seconds

    found = host.measure({name: functools.partial(step, seconds) for name, seconds in speeds.items()}, 2)
    ratios = {name: (row["of_best_eager"], row.get("of_best_compiled")) for name, row in found.items()}
    assert ratios["compile fused"] == (0.25, 0.5)
    assert ratios["compile transformers"] == (0.75, 1.5)
    assert ratios["fused"] == (0.125, None)
