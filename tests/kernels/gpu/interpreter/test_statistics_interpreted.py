import pytest
from statistics_cases import CASES, check_merge


@pytest.mark.parametrize(("channels", "block", "pixels"), CASES)
def test_merged_statistics_survive_a_large_mean(channels, block, pixels):
    check_merge(channels, block, pixels)
