"""What C launches a recorded call with, against Triton's own launcher, on a GPU that does nothing."""

import re

import hollow_support


def test_launches_are_those_of_triton(tmp_path):
    """Function, grid, threads, shared memory, stream and the bytes of every parameter."""
    script, driver = (hollow_support.HERE / name for name in ("launches_compared.py", "recording_driver.c"))
    printed = hollow_support.run(tmp_path, script, driver=driver)
    assert int(re.search(r"compared (\d+) launches", printed)[1]) > 100
