"""The short way to kernels that were launched alike before: the same results, and nothing alike but what is."""

from unittest import mock

import pytest
import torch
from convnext_fast.kernels import launching, parameters
from convnext_fast.kernels.launching import launch_again
from triton.runtime.jit import JITFunction

DEVICE = 1 << 20  # that no other launch is of


@pytest.fixture
def compiled():
    """What is known of the device, and how often Triton's own way was taken."""
    again = mock.patch.object(
        parameters, "launch", lambda k, grid, *args, **meta: launch_again(k, DEVICE, grid, args, meta)
    )
    with (
        again,
        mock.patch.object(launching, "_compiled", {}),
        mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as own,
    ):
        yield own


def fold(rows: int, offset: int = 0) -> None:
    """Fold random weights and compare; ``offset``: elements before w1 in its memory."""
    memory = torch.randn(rows * 24 + offset)
    w1, bias, g, beta, w2 = memory[offset:].view(rows, 24), *map(torch.randn, (rows, 24, 24)), torch.randn(24, rows)
    w1g, b1g, _ = parameters.fold_fwd(w1, bias, g, beta, w2, None, torch.float32)
    torch.testing.assert_close(w1g, w1 * g)
    torch.testing.assert_close(b1g, torch.stack((bias + w1 @ beta, w1g.sum(1))), rtol=1e-5, atol=1e-5)


def test_a_launch_alike_takes_the_short_way(emulating, compiled):
    with emulating(arch=80) as emulation:
        fold(48)
        fold(48)
        assert compiled.call_count == 1
        assert len(emulation.launches) == 2


@pytest.mark.parametrize("other", [lambda: fold(40), lambda: fold(48, offset=1)], ids=["size", "alignment"])
def test_a_launch_that_differs_does_not(emulating, compiled, other):
    with emulating(arch=80):
        fold(48)
        other()
        fold(48)
    assert compiled.call_count == 2
