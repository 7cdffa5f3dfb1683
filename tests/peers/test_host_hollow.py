"""What a step costs the host, of eager's in the same run, on a GPU that does nothing."""

import json

import hollow_support

MOST = {
    "inference": {"fused": 1.25, "frozen": 0.95, "fuse(timm)": 1.3},
    "training": {"fused": 1.1, "fuse(timm)": 1.15},
}
"""Of the best eager contender's time: what was measured, and about a fifth more for a busy machine."""
LAUNCHES = {"inference": {"fused": 76, "frozen": 55, "fuse(timm)": 76}, "training": {"fused": 235, "fuse(timm)": 237}}


def test_the_host_is_not_what_a_step_waits_for(tmp_path):
    names = ("eager", "eager transformers", "fused", "frozen", "fuse(timm)")
    script, output = hollow_support.ROOT / "bench" / "host.py", tmp_path / "output"
    hollow_support.run(tmp_path, script, "--contenders", *names, "--rounds", "9", "--output", str(output))
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert (output / "host.png").stat().st_size > 1000
    assert [row["failure"] for row in rows if row["failure"]] == []
    found = {(row["mode"], row["contender"]): row for row in rows}
    for mode, bounds in MOST.items():
        ratios = {name: found[mode, name]["of_best_eager"] for name in bounds}
        assert {name: found[mode, name]["launches"] for name in bounds} == LAUNCHES[mode]
        assert all(ratios[name] <= bounds[name] for name in bounds), ratios
