"""The global response norm of ConvNeXt V2 for Keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

_EPS = 1e-6


class GlobalResponseNorm(keras.layers.Layer):
    """weight·h·N + bias + h, see `ops.global_response_norm`; (N, H, W, K) to the same."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights, each (1, 1, 1, K), for a shape (N, H, W, K)."""
        shape = (1, 1, 1, input_shape[-1])
        self.weight, self.bias = (
            self.add_weight(shape=shape, initializer=lambda shape, dtype=None: np.zeros(shape, "float32"), name=name)
            for name in ("weight", "bias")
        )

    def call(self, h: Any) -> Any:
        """h: (N, H, W, K)."""
        squares = ops.sum(ops.square(ops.cast(h, "float32")), axis=(1, 2), keepdims=True)
        # A unit that is 0 in every pixel gets the gradient 0, not that of the square root.
        norms = ops.where(squares > 0, ops.sqrt(ops.where(squares > 0, squares, 1.0)), 0.0)
        scale = ops.cast(norms / (ops.mean(norms, axis=-1, keepdims=True) + _EPS), h.dtype)
        return h + (self.bias + self.weight * (h * scale))
