"""Keras's layers by the fused ops, if Keras runs on PyTorch.

Keras gives kernels TensorFlow's shape. Here their memory is in PyTorch's order (see `layers.initial`), so that the ops
get contiguous views.
"""

from __future__ import annotations

from typing import Any

import keras

from ..models.layer_changes import has_hooks
from ..models.layers import KERNEL_SIZE
from ..ops import functions
from .response_norm import GlobalResponseNorm

ON_TORCH = keras.backend.backend() == "torch"
DWCONV, CONV, DENSE = (2, 3, 0, 1), (3, 2, 0, 1), (1, 0)
"""The axes of Keras's kernels, (h, w, C, 1), (h, w, in, out) and (in, out), in PyTorch's order."""


def order_of(layer: Any) -> tuple[int, ...]:
    """The axes of the kernel of a layer in PyTorch's order."""
    depthwise, dense = isinstance(layer, keras.layers.DepthwiseConv2D), isinstance(layer, keras.layers.Dense)
    return DWCONV if depthwise else DENSE if dense else CONV


_AFFINE = {"use_bias": True, "activation": keras.activations.linear}
_CONV = {"data_format": "channels_last", "dilation_rate": (1, 1), **_AFFINE}
_DEPTHWISE = {"kernel_size": (KERNEL_SIZE,) * 2, "padding": "same", "strides": (1, 1), "depth_multiplier": 1, **_CONV}
_SETTINGS: dict[type, dict[str, Any]] = {
    keras.layers.DepthwiseConv2D: _DEPTHWISE,
    keras.layers.Conv2D: {"padding": "valid", "groups": 1, "lora_enabled": False, **_CONV},
    keras.layers.Dense: {"lora_enabled": False, **_AFFINE},
    keras.layers.LayerNormalization: {"axis": [-1], "center": True, "scale": True, "rms_scaling": False},
    GlobalResponseNorm: {},
}
"""The layers that the ops can replace, and the settings they need."""


def serves(owner: Any, *layers: Any) -> bool:
    """Whether the ops can replace these layers of ``owner``.

    They can on PyTorch, for Keras's own layers with the settings that this package gives them: without LoRA, quantised
    weights, hooks, a replaced call or activation, a regulariser of the output, or another policy than the owner's.
    """
    return ON_TORCH and all(_is_known(layer, owner.dtype_policy) for layer in layers)


def _is_known(layer: Any, policy: Any) -> bool:
    settings = _SETTINGS.get(type(layer))
    return (
        settings is not None
        and all(getattr(layer, name) == value for name, value in settings.items())
        and (not isinstance(layer, keras.layers.Conv2D) or layer.strides == layer.kernel_size)
        and layer.dtype_policy == policy
        and layer.quantization_mode is None
        and layer.activity_regularizer is None
        and not layer.__dict__.keys() & {"call", "forward"}
        and not has_hooks(layer)
    )


def block(layer: Any, x: Any, drop_scale: Any) -> Any:
    """A `layers.ConvNextLayer`, (N, H, W, C) to the same; ``drop_scale``: (N,) or None."""
    dwconv, norm, fc1, fc2, grn = layer.dwconv, layer.layernorm, layer.pwconv1, layer.pwconv2, layer.grn
    first = dwconv.kernel.value.permute(DWCONV), *_values(dwconv.bias, norm.gamma, norm.beta), *_linear(fc1)
    options = {"drop_scale": drop_scale, "eps": norm.epsilon, "act": layer.act}
    if grn is not None:
        response = [value.flatten() for value in _values(grn.weight, grn.bias)]
        return functions.convnext_v2_block(x, *first, *response, *_linear(fc2), **options)
    gamma = None if layer.gamma is None else layer.gamma.value
    return functions.convnext_block(x, *first, *_linear(fc2), gamma, **options)


def stem(conv: Any, norm: Any, image: Any) -> Any:
    """Convolution, then LayerNorm: (N, C, H, W) to (N, H', W', C')."""
    weights = conv.kernel.value.permute(CONV), *_values(conv.bias, norm.gamma, norm.beta)
    return functions.patchify_stem(image, *weights, eps=norm.epsilon)


def downsample(norm: Any, conv: Any, x: Any) -> Any:
    """LayerNorm, then convolution: (N, H, W, C) to (N, H', W', C')."""
    weights = *_values(norm.gamma, norm.beta), conv.kernel.value.permute(CONV), conv.bias.value
    return functions.downsample(x, *weights, eps=norm.epsilon)


def _linear(layer: Any) -> tuple[Any, Any]:
    return layer.kernel.value.permute(DENSE), layer.bias.value


def _values(*variables: Any) -> list[Any]:
    return [variable.value for variable in variables]
