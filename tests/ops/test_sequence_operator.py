"""The operator of a frozen model's steps: its schema, and the shapes that compilers get."""

import pytest
import torch
from support import randomise
from torch import nn

from convnext_fast import ConvNext, ConvNextConfig
from convnext_fast.backends.steps import Kind
from convnext_fast.models.whole_runs import steps_of
from convnext_fast.ops.sequence_operator import frozen_steps, live_steps


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [16, 12])
def test_opcheck(bias, channels):
    """With steps that the kernels support, and with others."""
    config = ConvNextConfig(num_stages=2, hidden_sizes=[channels, 24], depths=[1, 1])
    model = randomise(ConvNext(config)).freeze()
    found = steps_of(nn.Sequential(model.stem, model.stages))
    steps, kinds = [list(step.weights) for step in found], [int(step.kind) for step in found]
    tokens = [step.token for step in found]
    if not bias:
        steps[0][1] = steps[1][1] = None
    assert kinds == [Kind.STEM, Kind.BLOCK, Kind.DOWNSAMPLE, Kind.BLOCK]
    for ends in ([3], [0, 2, 3]):
        for samples in (2, 0):
            image, weights = torch.randn(samples, 3, 33, 32), [weight for step in steps for weight in step]
            arguments = image, weights, tokens, kinds, [1e-6] * 4, "gelu", ends
            torch.library.opcheck(frozen_steps, arguments, test_utils=("test_schema", "test_faketensor"))
    one = torch.randn(2, 9, 8, channels), steps[2], tokens[2:3], [int(Kind.DOWNSAMPLE)], [1e-6], "", [0]
    torch.library.opcheck(frozen_steps, one, test_utils=("test_schema", "test_faketensor"))


def test_weights_as_they_are_where_the_device_has_no_kernels():
    """A compiler traces for any GPU; on one that the kernels do not support, nothing is kept."""
    model = randomise(ConvNext(ConvNextConfig(num_stages=2, hidden_sizes=[16, 24], depths=[1, 1]))).freeze()
    found = steps_of(nn.Sequential(model.stem, model.stages))
    weights, kinds = [w for step in found for w in step.weights], [int(step.kind) for step in found]
    image, rest = torch.randn(2, 3, 33, 32), (kinds, [1e-6] * 4, "gelu", [3])
    with torch.no_grad():
        frozen = frozen_steps(image, weights, [step.token for step in found], *rest)
        live = live_steps(image, weights, [None] * 4, *rest)
    torch.testing.assert_close(live, frozen)
