import pytest
from statistics_cases import CASES, check_merge


@pytest.mark.parametrize(("channels", "block", "pixels"), CASES)
def test_merged_statistics_survive_a_large_mean(emulating, channels, block, pixels):
    with emulating(arch=80, detect_races="rw"):
        check_merge(channels, block, pixels)
