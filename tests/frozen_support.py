"""Frozen blocks for tests, and the reference on their weights."""

import torch
from block_cases import block_parameters, v2_parameters

from convnext_fast.backends import reference
from convnext_fast.models.layer_changes import changed
from convnext_fast.models.plan import ChainPlan
from convnext_fast.models.run_plan import read, step_of
from convnext_fast.ops.folded_weights import folded
from convnext_fast.ops.folding import freeze_block


def folded_weights(module):
    """What a frozen block or downsampling layer computes with; None of any other module, or where its plan fails."""
    state = module._convnext_fast
    if state.trainable is None or isinstance(state.plan, ChainPlan) or changed(module, state.plan) is not None:
        return None
    return folded(step_of(module, state.plan, read(module, state.plan), state.token))


@torch.no_grad()
def frozen_weights(channels, hidden, side):
    return freeze_block(**block_parameters(channels, hidden, side, torch.float32))


@torch.no_grad()
def frozen_v2_weights(channels, hidden, side):
    return freeze_block(**v2_parameters(channels, hidden, side, torch.float32), gamma=None)


def plain_block(x, weights, act):
    dwconv_weight, dwconv_bias, w1, b1, w2, b2, grn_weight = (None if t is None else t.to(x.dtype) for t in weights)
    ones, zeros = x.new_ones(x.shape[3]), x.new_zeros(x.shape[3])
    weights = dwconv_weight, dwconv_bias, ones, zeros, w1, b1[0], w2, b2
    grn = (None, None) if grn_weight is None else (grn_weight, torch.zeros_like(grn_weight))
    return reference.convnext_block(x, *weights, None, None, 1e-6, act, *grn)
