"""`fuse` leaves no trace of the trials with which it confirms a block, nor of a refusal."""

import random
import warnings

import numpy as np
import pytest
import torch
from fuse_support import one_thread  # noqa: F401
from torch import nn
from transformers import ConvNextConfig, ConvNextModel
from transformers.models.convnext.modeling_convnext import ConvNextLayer

from convnext_fast import ConvNext, fuse


class Noisy(ConvNextLayer):
    """Leaves traces of every kind."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen, self.counts = [], {}
        self.register_buffer("total", torch.zeros(1))

    def forward(self, features):
        self.seen.append(random.random() + np.random.rand() + float(torch.rand(1)))
        self.counts["calls"] = len(self.seen)
        self.total += 1
        warnings.warn("noise", stacklevel=2)
        return super().forward(features)


@pytest.mark.filterwarnings("error")
def test_the_trial_of_a_block_leaves_no_trace():
    """Also in the generators of Python and NumPy, with which some hosts drop paths."""
    block = Noisy(ConvNextConfig(), 8)

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    fuse(nn.Sequential(block, nn.Identity()))
    assert states() == before
    assert (block.seen, block.counts, block.total.item()) == ([], {}, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: ConvNextModel(ConvNextConfig(depths=[1, 1, 1, 1])), lambda: ConvNext("atto")])
def test_scripting_is_refused_by_name(make):
    """`torch.jit.script` asks each module first, before anything about the model changes."""
    model = make()
    fuse(model)
    kinds = list(map(type, model.modules()))
    with pytest.raises(TypeError, match=r"torch.jit.script does not compile .* call unfuse\(model\) first"):
        torch.jit.script(model)
    assert list(map(type, model.modules())) == kinds
