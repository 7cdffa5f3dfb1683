"""A frozen block on a CPU in float32 as four calls of oneDNN: convolution, LayerNorm, fc1 with the activation, fc2 with
x added. Weights are in oneDNN's own layouts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import onednn
from .mlp import ACTIVATIONS_
from .row_blocks import row_blocks

_convolution = torch.ops.mkldnn._convolution_pointwise.default
_linear = torch.ops.mkldnn._linear_pointwise.default
_linear_add = torch.ops.mkldnn._linear_pointwise.binary


class OnednnBlock:
    """What the calls of one block take besides the image. Layouts are those for images of ``shape``, (N, H, W, C)."""

    def __init__(self, shape: Sequence[int], weights: tuple[Tensor | None, ...], act: str):
        dwconv_weight, self.dwconv_bias, w1, b1, w2, self.b2 = weights
        self.channels = dwconv_weight.shape[0]
        self.hidden_bytes = w1.shape[0] * w1.element_size()
        self.padding = [side // 2 for side in dwconv_weight.shape[2:]]
        self.after = None if onednn.fuses(act) else ACTIVATIONS_[act]
        self.activation, self.algorithm = onednn.fused_activation(None if self.after else act)
        samples, height, width, _ = shape
        size = [samples, self.channels, height, width]
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.dwconv_weight = reorder(dwconv_weight, self.padding, [1, 1], [1, 1], self.channels, size)
        pixels = samples * height * width
        self.w1 = torch.ops.mkldnn._reorder_linear_weight(w1, pixels)
        self.w2 = torch.ops.mkldnn._reorder_linear_weight(w2, pixels)
        self.b1 = b1[0]

    def mlp(self, u: Tensor, residual: Tensor, eps: float) -> Tensor:
        """residual + fc2(act(fc1(LayerNorm(u)))), pixel by pixel; u, residual: (…, C)."""
        n = torch.native_layer_norm(u, [self.channels], None, None, eps)[0]
        h = _linear(n, self.w1, self.b1, self.activation, [], self.algorithm)
        if self.after is not None:
            self.after(h)
        return _linear_add(h, residual, self.w2, self.b2, "add")

    def __call__(self, x: Tensor, eps: float) -> Tensor:
        """`prepared.Prepared`."""
        channels = self.channels
        u = _convolution(
            x.permute(0, 3, 1, 2), self.dwconv_weight, self.dwconv_bias, self.padding, [1, 1], [1, 1], channels,
            "none", [], "",
        )  # fmt: skip
        u = u.permute(0, 2, 3, 1)
        blocks = row_blocks(x.numel() // channels, self.hidden_bytes)
        if len(blocks) == 1:
            return self.mlp(u, x, eps)
        u, residual = u.reshape(-1, channels), x.view(-1, channels)
        for rows in blocks:  # the result takes the place of u, which saves the page faults of a large new tensor
            u[rows] = self.mlp(u[rows], residual[rows], eps)
        return u.view(x.shape)
