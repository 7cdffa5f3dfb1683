"""The least operations and bytes that a model or a block needs, from which the roofline's time follows.

FLOPs are products and sums of convolutions and linear layers, without recomputation. Bytes count the input, the output
and the parameters of each layer (of a block, as a whole) once: running one after another moves at least these.
"""

from __future__ import annotations

from typing import NamedTuple

from convnext_fast import ConvNextConfig
from convnext_fast.cli.info import count
from convnext_fast.models.layers import KERNEL_SIZE

MODES = ("forward", "backward", "both")


class Work(NamedTuple):
    """FLOPs and bytes of a pass."""

    flops: float
    bytes: float


def _pass(macs: float, inputs: float, outputs: float, parameters: float, size: int, mode: str) -> Work:
    """Forward reads the input and the parameters and writes the output. Backward takes two products for each of the
    forward's, reads the input, the output's gradient and the parameters, and writes the gradients of input and
    parameters.
    """
    forward = Work(2 * macs, size * (inputs + outputs + parameters))
    backward = Work(4 * macs, size * (2 * inputs + outputs + 2 * parameters))
    if mode == "forward":
        return forward
    return backward if mode == "backward" else Work(*(a + b for a, b in zip(forward, backward, strict=True)))


def op_work(op: str, shape: tuple[int, int, int, int], size: int, mode: str) -> Work:
    """Work of one op of `cases` on x of ``shape`` (N, H, W, C); ``size``: bytes an element."""
    n, h, w, c = shape
    pixels, taps = n * h * w, KERNEL_SIZE**2
    if op == "dwconv_layernorm":
        return _pass(pixels * c * taps, pixels * c, pixels * c, c * (taps + 3), size, mode)
    if op == "pointwise_mlp":
        return _pass(pixels * 8 * c * c, 2 * pixels * c, pixels * c, 8 * c * c + 6 * c, size, mode)
    if op == "convnext_block":
        return _pass(pixels * c * (taps + 8 * c), pixels * c, pixels * c, c * (taps + 8 * c + 9), size, mode)
    if op == "convnext_v2_block":
        return _pass(pixels * c * (taps + 8 * c), pixels * c, pixels * c, c * (taps + 8 * c + 16), size, mode)
    if op == "patchify_stem":
        out = pixels // 16 * 96
        return _pass(out * 16 * c, pixels * c, out, 96 * (16 * c + 3), size, mode)
    if op == "downsample":
        out = pixels // 4 * 2 * c
        return _pass(out * 4 * c, pixels * c, out, 8 * c * c + 4 * c, size, mode)
    raise ValueError(f"op is {op!r}: expected one of bench.cases.OPS")


def model_work(config: ConvNextConfig, batch: int, side: int, size: int, training: bool) -> Work:
    """Work of a whole model on ``batch`` images of ``side``²; ``size``: bytes an element."""
    mode = "both" if training else "forward"
    parts = count(config, side)
    image = config.num_channels * side * side
    total = [0.0, 0.0]
    before = image
    for part in parts:
        out = part.channels * part.height * part.width
        inputs, outputs = before + part.blocks * out, out + part.blocks * out
        if part.blocks and before == out:  # the first stage has no downsampling layer
            inputs, outputs = part.blocks * out, part.blocks * out
        work = _pass(batch * part.macs, batch * inputs, batch * outputs, part.parameters, size, mode)
        total = [a + b for a, b in zip(total, work, strict=True)]
        before = out
    return Work(*total)
