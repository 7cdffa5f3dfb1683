"""Every kernel test runs with outputs that are full of NaN until a kernel writes them."""

import pytest
from kernel_support import poisoned


@pytest.fixture(autouse=True)
def _nan_poisoned_allocations():
    with poisoned():
        yield
