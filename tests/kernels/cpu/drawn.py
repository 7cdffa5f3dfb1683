"""Random sizes to compile a kernel for, each of which takes a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def drawn(*strategies: st.SearchStrategy, few: int, many: int) -> Callable:
    """Make a test of a machine and of random values: with ``few`` draws by default, and ``many`` with -m thorough."""

    def decorate(test: Callable) -> Callable:
        @pytest.mark.parametrize("draws", [few, pytest.param(many, marks=pytest.mark.thorough)])
        def run(machine: Any, draws: int) -> None:
            @settings(max_examples=draws, deadline=None)
            @given(st.tuples(*strategies))
            def check(values: tuple) -> None:
                test(machine, *values)

            # Failing examples are kept by the test's source, which is the same for all that are decorated.
            check.hypothesis.inner_test._hypothesis_internal_add_digest = test.__qualname__.encode()
            check()

        run.__name__ = test.__name__
        return run

    return decorate
