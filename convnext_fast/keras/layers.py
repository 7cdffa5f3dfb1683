"""The layers of a ConvNeXt for Keras, with the names that transformers' TensorFlow layers have.

Activations are (N, H, W, C). Names have "_" for ".", which PyTorch does not allow: ``stages_0``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from ..config import ConvNextConfig
from ..models.layers import KERNEL_SIZE
from . import fused
from .response_norm import GlobalResponseNorm

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: ops.gelu(x, approximate=False),
    "gelu_new": lambda x: ops.gelu(x, approximate=True),
    "relu": ops.relu,
    "silu": ops.silu,
    "selu": ops.selu,
}


def initial(std: float, order: tuple[int, ...]) -> Callable[..., np.ndarray]:
    """An initialiser that draws kernels from N(0, std²) clipped to ±2, as the official code does.

    It uses NumPy, because JAX compiles its own generator for every shape, with a seed from Python's generator, as Keras
    does. The memory is in PyTorch's ``order``, see `fused`, which only PyTorch keeps.
    """

    def draw(shape: tuple[int, ...], dtype: Any = None) -> np.ndarray:
        generator = np.random.default_rng(random.randrange(1 << 32))
        values = generator.normal(0.0, std, [shape[i] for i in order]).clip(-2.0, 2.0).astype("float32")
        return values.transpose(np.argsort(order))

    return draw


def _full(value: float) -> Callable[..., np.ndarray]:
    return lambda shape, dtype=None: np.full(shape, value, "float32")


def _norm(eps: float, name: str, policy: Any) -> keras.layers.LayerNormalization:
    start = {"gamma_initializer": _full(1.0), "beta_initializer": _full(0.0)}
    return keras.layers.LayerNormalization(epsilon=eps, name=name, dtype=policy, **start)


def dense(units: int, std: float, name: str, policy: Any) -> keras.layers.Dense:
    """A linear layer with the initial weights of this package."""
    start = {"kernel_initializer": initial(std, fused.DENSE), "bias_initializer": _full(0.0)}
    return keras.layers.Dense(units, name=name, dtype=policy, **start)


def _patch_conv(channels: int, patch: int | tuple[int, int], std: float, name: str, policy: Any) -> Any:
    start = {"kernel_initializer": initial(std, fused.CONV), "bias_initializer": _full(0.0)}
    layout = {"strides": patch, "data_format": "channels_last"}
    return keras.layers.Conv2D(channels, patch, name=name, dtype=policy, **layout, **start)


class ConvNextLayer(keras.layers.Layer):
    """The block: x + drop_path(γ · pwconv2(grn(act(pwconv1(LayerNorm(dwconv(x))))))), (N, H, W, C) to the same.

    V1 has no grn, V2 no γ.
    """

    def __init__(self, config: ConvNextConfig, channels: int, rate: float, **options: Any):
        super().__init__(**options)
        std, policy = config.initializer_range, self.dtype_policy
        start = {"depthwise_initializer": initial(std, fused.DWCONV), "bias_initializer": _full(0.0)}
        # A convolution with C groups would be several times slower in TensorFlow on a CPU.
        self.dwconv = keras.layers.DepthwiseConv2D(
            KERNEL_SIZE, padding="same", data_format="channels_last", name="dwconv", dtype=policy, **start
        )
        self.layernorm = _norm(config.norm_eps, "layernorm", policy)
        self.pwconv1 = dense(4 * channels, std, "pwconv1", policy)
        self.grn = GlobalResponseNorm(name="grn", dtype=policy) if config.version == 2 else None
        self.pwconv2 = dense(channels, std, "pwconv2", policy)
        self.act, self.rate, self.layer_scale = config.activation, rate, config.layer_scale_init_value
        self.gamma = None
        self.seeds = keras.random.SeedGenerator() if rate else None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights for a shape (N, H, W, C), of which only C matters."""
        channels = input_shape[-1]
        self.dwconv.build(input_shape)
        self.layernorm.build(input_shape)
        self.pwconv1.build(input_shape)
        for layer in filter(None, (self.grn, self.pwconv2)):
            layer.build((*input_shape[:-1], 4 * channels))
        if self.layer_scale > 0:
            scale = _full(self.layer_scale)
            self.gamma = self.add_weight(shape=(channels,), initializer=scale, name="layer_scale_parameter")

    def call(self, x: Any, training: bool | None = None) -> Any:
        """x: (N, H, W, C)."""
        scale = self._drop_scale(x) if training and self.rate else None
        grn = [] if self.grn is None else [self.grn]
        if fused.serves(self, self.dwconv, self.layernorm, self.pwconv1, *grn, self.pwconv2):
            return fused.block(self, x, scale)
        h = ACTIVATIONS[self.act](self.pwconv1(self.layernorm(self.dwconv(x))))
        y = self.pwconv2(h if self.grn is None else self.grn(h))
        if self.gamma is not None:
            y = y * self.gamma
        return x + (y if scale is None else y * ops.reshape(scale, (-1, 1, 1, 1)))

    def _drop_scale(self, x: Any) -> Any:
        """The factor of each sample, (N,): 0, or 1/(1 − rate)."""
        keep = 1.0 - self.rate
        kept = keras.random.uniform((ops.shape(x)[0],), dtype="float32", seed=self.seeds) < keep
        return ops.cast(ops.cast(kept, "float32") / (keep or 1.0), x.dtype)


class ConvNextEmbeddings(keras.layers.Layer):
    """The stem: patch convolution, then LayerNorm, (N, C, H, W) to (N, H', W', C')."""

    def __init__(self, config: ConvNextConfig, **options: Any):
        super().__init__(**options)
        channels, std, policy = config.hidden_sizes[0], config.initializer_range, self.dtype_policy
        self.patch_embeddings = _patch_conv(channels, config.patch_shape, std, "patch_embeddings", policy)
        self.layernorm = _norm(config.norm_eps, "layernorm", policy)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights for images (N, C, H, W)."""
        self.patch_embeddings.build((None, None, None, input_shape[1]))
        self.layernorm.build((None, None, None, self.patch_embeddings.filters))

    def call(self, image: Any) -> Any:
        """image: (N, C, H, W)."""
        conv, norm = self.patch_embeddings, self.layernorm
        if fused.serves(self, conv, norm):
            return fused.stem(conv, norm, image)
        return norm(conv(ops.transpose(image, (0, 2, 3, 1))))


class ConvNextStage(keras.layers.Layer):
    """Downsampling, except in the first stage, then blocks."""

    def __init__(self, config: ConvNextConfig, index: int, rates: list[float], **options: Any):
        super().__init__(**options)
        channels, std, policy = config.hidden_sizes[index], config.initializer_range, self.dtype_policy
        self.downsampling_layer = []
        if index > 0:
            norm = _norm(config.norm_eps, "downsampling_layer_0", policy)
            self.downsampling_layer = [norm, _patch_conv(channels, 2, std, "downsampling_layer_1", policy)]
        self.layers = [
            ConvNextLayer(config, channels, rate, name=f"layers_{j}", dtype=policy) for j, rate in enumerate(rates)
        ]
        self.channels = channels

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights for a shape (N, H, W, C)."""
        for layer in self.downsampling_layer:
            layer.build(input_shape)
        for layer in self.layers:
            layer.build((None, None, None, self.channels))

    def call(self, x: Any) -> Any:
        """x: (N, H, W, C); returns (N, ⌊H/2⌋, ⌊W/2⌋, C'), in the first stage the same shape."""
        if self.downsampling_layer:
            norm, conv = self.downsampling_layer
            x = fused.downsample(norm, conv, x) if fused.serves(self, norm, conv) else conv(norm(x))
        for layer in self.layers:
            x = layer(x)
        return x


class ConvNextEncoder(keras.layers.Layer):
    """The stages: (N, H, W, C) to a list of that input and the output of each stage."""

    def __init__(self, config: ConvNextConfig, **options: Any):
        super().__init__(**options)
        self.stages = [
            ConvNextStage(config, i, rates, name=f"stages_{i}", dtype=self.dtype_policy)
            for i, rates in enumerate(config.drop_path_rates)
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights for a shape (N, H, W, C)."""
        for stage in self.stages:
            stage.build(input_shape)
            input_shape = (None, None, None, stage.channels)

    def call(self, x: Any) -> list[Any]:
        """x: (N, H, W, C)."""
        states = [x]
        for stage in self.stages:
            states.append(stage(states[-1]))
        return states


class ConvNextMainLayer(keras.layers.Layer):
    """Stem, stages and the pooled features: (N, C, H, W) to (states, each (N, H, W, C); pooled, (N, C) or None)."""

    def __init__(self, config: ConvNextConfig, add_pooling_layer: bool = True, **options: Any):
        super().__init__(**options)
        policy = self.dtype_policy
        self.embeddings = ConvNextEmbeddings(config, name="embeddings", dtype=policy)
        self.encoder = ConvNextEncoder(config, name="encoder", dtype=policy)
        self.layernorm = _norm(config.layer_norm_eps, "layernorm", policy) if add_pooling_layer else None
        self.widths = config.hidden_sizes

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights for images (N, C, H, W)."""
        self.embeddings.build(input_shape)
        self.encoder.build((None, None, None, self.widths[0]))
        if self.layernorm is not None:
            self.layernorm.build((None, self.widths[-1]))

    def call(self, image: Any) -> tuple[list[Any], Any]:
        """image: (N, C, H, W)."""
        states = self.encoder(self.embeddings(image))
        pooled = None if self.layernorm is None else self.layernorm(ops.mean(states[-1], axis=(1, 2)))
        return states, pooled
