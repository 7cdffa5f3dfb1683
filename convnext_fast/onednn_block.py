"""A frozen block on a CPU in float32 as four calls: convolution, LayerNorm, fc1 with the activation, fc2 with x added.

One image keeps a processor busy for so short that what Python does around these calls shows in the time. So all that
does not depend on the image is prepared once, weights in oneDNN's own layouts among it, and kept as long as the weights
live.
"""

from __future__ import annotations

import operator
import weakref

import torch
from torch import Tensor

from . import onednn
from .aten_rows import ACTIVATIONS_, row_blocks

_convolution = torch.ops.mkldnn._convolution_pointwise.default
_linear = torch.ops.mkldnn._linear_pointwise.default
_linear_add = torch.ops.mkldnn._linear_pointwise.binary


class _Prepared:
    """What the calls of one block take besides the image; ``made_of`` says of what, apart from w1."""

    def __init__(self, x: Tensor, weights: tuple[Tensor | None, ...], act: str):
        dwconv_weight, self.dwconv_bias, w1, b1, w2, self.b2 = weights
        self.made_of = dwconv_weight, self.dwconv_bias, b1, w2, self.b2
        self.act = act
        self.channels = dwconv_weight.shape[0]
        self.hidden_bytes = w1.shape[0] * w1.element_size()
        self.padding = [side // 2 for side in dwconv_weight.shape[2:]]
        self.after = None if onednn.fuses(act) else ACTIVATIONS_[act]
        self.activation, self.algorithm = onednn.fused_activation(None if self.after else act)
        size = [x.shape[0], self.channels, *x.shape[1:3]]
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.dwconv_weight = reorder(dwconv_weight, self.padding, [1, 1], [1, 1], self.channels, size)
        pixels = x.numel() // self.channels
        self.w1 = torch.ops.mkldnn._reorder_linear_weight(w1, pixels)
        self.w2 = torch.ops.mkldnn._reorder_linear_weight(w2, pixels)
        self.b1 = b1[0]

    def is_of(self, weights: tuple[Tensor | None, ...], act: str) -> bool:
        """Whether it was made of these very tensors."""
        dwconv_weight, dwconv_bias, _, b1, w2, b2 = weights
        given = dwconv_weight, dwconv_bias, b1, w2, b2
        return self.act == act and all(map(operator.is_, self.made_of, given))

    def mlp(self, u: Tensor, residual: Tensor, eps: float) -> Tensor:
        """residual + fc2(act(fc1(LayerNorm(u)))), pixel by pixel; u, residual: (…, C)."""
        n = torch.native_layer_norm(u, [self.channels], None, None, eps)[0]
        h = _linear(n, self.w1, self.b1, self.activation, [], self.algorithm)
        if self.after is not None:
            self.after(h)
        return _linear_add(h, residual, self.w2, self.b2, "add")


_PREPARED: dict[int, _Prepared] = {}
"""By the ``id`` of w1, until w1 dies."""


def _prepared(x: Tensor, weights: tuple[Tensor | None, ...], act: str) -> _Prepared:
    w1 = weights[2]
    found = _PREPARED.get(id(w1))
    if found is None:
        weakref.finalize(w1, _PREPARED.pop, id(w1), None)
    if found is None or not found.is_of(weights, act):
        found = _PREPARED[id(w1)] = _Prepared(x, weights, act)
    return found


def frozen_block_fwd(x: Tensor, *weights: Tensor | None, eps: float, act: str) -> Tensor:
    """`aten.frozen_block_fwd` for x that `onednn.serves`, contiguous; ``weights``: of `folding.FrozenBlock`.

    The weights must never change, and layouts are those for the size of the first x.
    """
    block = _prepared(x, weights, act)
    channels = block.channels
    u = _convolution(
        x.permute(0, 3, 1, 2), block.dwconv_weight, block.dwconv_bias, block.padding, [1, 1], [1, 1], channels,
        "none", [], "",
    )  # fmt: skip
    u = u.permute(0, 2, 3, 1)
    blocks = row_blocks(x.numel() // channels, block.hidden_bytes)
    if len(blocks) == 1:
        return block.mlp(u, x, eps)
    u, residual = u.reshape(-1, channels), x.view(-1, channels)
    for rows in blocks:  # the result takes the place of u, which saves the page faults of a large new tensor
        u[rows] = block.mlp(u[rows], residual[rows], eps)
    return u.view(x.shape)
