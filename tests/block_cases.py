"""Random parameters and activations of a block."""

from __future__ import annotations

import torch


def block_parameters(channels, hidden, kernel, dtype, layer_scale=True, dwconv_bias=True):
    """Parameters of a block by argument name, all from N(0, 1) or scaled to keep activations near 1."""
    shapes = {
        "dwconv_weight": (channels, 1, kernel, kernel),
        "dwconv_bias": (channels,) if dwconv_bias else None,
        "ln_weight": (channels,),
        "ln_bias": (channels,),
        "w1": (hidden, channels),
        "b1": (hidden,),
        "w2": (channels, hidden),
        "b2": (channels,),
        "gamma": (channels,) if layer_scale else None,
    }

    return {name: _draw(shape, dtype) for name, shape in shapes.items()}


def v2_parameters(channels, hidden, kernel, dtype, dwconv_bias=True):
    """Those of `ops.convnext_v2_block` alike."""
    parameters = block_parameters(channels, hidden, kernel, dtype, False, dwconv_bias)
    del parameters["gamma"]
    return {**parameters, **{name: _draw((hidden,), dtype) for name in ("grn_weight", "grn_bias")}}


def _draw(shape, dtype):
    if shape is None:
        return None
    scale = (shape[1:] and torch.Size(shape[1:]).numel() ** -0.5) or 1.0
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def activations(shape, dtype, layout):
    """A leaf (N, H, W, C) tensor in one of several memory layouts."""
    n, h, w, c = shape
    if layout == "contiguous":
        x = torch.randn(n, h, w, c, dtype=dtype)
    elif layout == "nchw":
        x = torch.randn(n, c, h, w, dtype=dtype).permute(0, 2, 3, 1)
    else:
        x = torch.randn(n, h, 2 * w, c + 1, dtype=dtype)[:, :, ::2, 1:]
    return x.detach().requires_grad_()
