"""What `bench.host` does without a GPU."""

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
        "| inference | frozen | 0.50 | 1.23 | 55 | 0 |",
        "| training | compile | OSError: no | – | – | – |",
    ]


def test_the_plot_has_a_bar_for_each_contender(tmp_path):
    row = {"mode": "inference", "contender": "frozen", "failure": None, "of_best_eager": 0.5}
    host.draw([row, row | {"contender": "eager", "of_best_eager": 1.0}], tmp_path / "host.png")
    assert (tmp_path / "host.png").read_bytes()[:4] == b"\x89PNG"
