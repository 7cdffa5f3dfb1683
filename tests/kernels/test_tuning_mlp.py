from itertools import pairwise

import pytest
from convnext_fast.kernels.targets import TARGETS
from convnext_fast.kernels.tuning_mlp import split_width

TUNED = (40, 48, 64, 80, 96, 128, 160, 192)


@pytest.mark.parametrize("target", TARGETS)
def test_parts_cover_the_width_and_waste_little(target):
    for channels in range(1, 193):
        parts = split_width(channels, target)
        assert parts[0][0] == 0
        for (first, width), (following, _) in pairwise(parts):
            assert first + width == following
        assert all(width >= 16 and width & (width - 1) == 0 for _, width in parts)
        covered = sum(parts[-1])
        assert covered >= channels
        assert covered - parts[-1][1] < channels
        assert channels not in TUNED or covered <= 1.2 * channels
