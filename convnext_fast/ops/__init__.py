"""The fused ops on (N, H, W, C) tensors: validated, differentiable, traceable and aware of autocast."""

import torch.fx

from .functions import (
    convnext_block,
    convnext_v2_block,
    downsample,
    dwconv_layernorm,
    frozen_block,
    frozen_downsample,
    global_response_norm,
    patchify_stem,
    pointwise_mlp,
)

__all__ = [
    "convnext_block",
    "convnext_v2_block",
    "downsample",
    "dwconv_layernorm",
    "frozen_block",
    "frozen_downsample",
    "global_response_norm",
    "patchify_stem",
    "pointwise_mlp",
]

for _name in __all__:
    torch.fx.wrap(_name)  # symbolic tracing records a call of one of these names, in this module, as one node
