"""A small frozen model of either kind, its parts, and the plain model to compare with."""

import copy

import pytest
import torch
from support import no_worse

from convnext_fast import ConvNext, ConvNextConfig, ConvNextModel
from convnext_fast.backends.cpu import llvm
from convnext_fast.models.layers import ConvNextBlock

needs_kernels = pytest.mark.skipif(
    not llvm.serves_block(16, 64, "gelu"), reason="these kernels need x86, Linux, AVX2 and llvmlite"
)
CONFIG = ConvNextConfig(num_stages=2, hidden_sizes=[16, 24], depths=[3, 2], num_labels=40)
KINDS = ConvNext, ConvNextModel
WHOLE = 1 + 3 + 1 + 2  # stem, blocks, downsampling, blocks
"""Steps of the model."""


def in_turn(cases, *rest):
    """(kind of model, case, *rest), with alternating kinds, because compiling takes long; thorough: with both kinds."""
    return [
        pytest.param(kind, case, *rest, marks=() if (i + j) % 2 == 0 else pytest.mark.thorough)
        for i, case in enumerate(cases)
        for j, kind in enumerate(KINDS)
    ]


def output(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


def check(got, model, x):
    """Against the plain model in float64; no worse than twice the plain model in float32."""
    assert no_worse(got, plain(model, x, torch.float64), plain(model, x, torch.float32))


def plain(model, x, dtype):
    copied = copy.deepcopy(model)
    copied.fused = False
    return output(copied.to(dtype), x.to(dtype))


def stages(model):
    return model.stages if isinstance(model, ConvNext) else model.encoder.stages


def blocks_of(model, stage):
    return stages(model)[stage].blocks if isinstance(model, ConvNext) else stages(model)[stage].layers


def dwconv_of(block):
    return block.conv_dw if isinstance(block, ConvNextBlock) else block.dwconv


def downsampling(model):
    return stages(model)[1].downsample if isinstance(model, ConvNext) else stages(model)[1].downsampling_layer


def stem_of(model):
    return model.stem if isinstance(model, ConvNext) else model.embeddings
