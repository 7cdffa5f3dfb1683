"""A frozen host of timm or torchvision uses other parameters however it gets them."""

from __future__ import annotations

import pytest
from fuse_support import one_thread  # noqa: F401
from other_parameters import WAYS, check_way
from small_hosts import MODELS


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_other_parameters_are_honoured(made, name):
    check_way(name, made)
