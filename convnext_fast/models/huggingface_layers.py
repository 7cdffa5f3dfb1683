"""The modules of a ConvNeXt under transformers' names: stem, block, stage and encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..backends.reference import ACTIVATION_FUNCTIONS
from ..config import ConvNextConfig
from .drop_path import ConvNextDropPath
from .fused_module import outputs_in_turn
from .layers import (
    KERNEL_SIZE,
    ConvNextBlockBase,
    Downsample,
    GlobalResponseNorm,
    LayerNorm2d,
    PatchLayer,
    Stage,
    new_layer_scale,
)


class ConvNextLayer(ConvNextBlockBase):
    """The block under transformers' names: dwconv, layernorm, pwconv1, pwconv2, layer_scale_parameter, in V2 grn."""

    def __init__(self, config: ConvNextConfig, channels: int, drop_path: float, fused: bool, **factory: Any):
        super().__init__()
        padding = KERNEL_SIZE // 2
        self.dwconv = nn.Conv2d(channels, channels, KERNEL_SIZE, padding=padding, groups=channels, **factory)
        self.layernorm = nn.LayerNorm(channels, eps=config.norm_eps, **factory)
        self.pwconv1 = nn.Linear(channels, 4 * channels, **factory)
        if config.version == 2:
            self.grn = GlobalResponseNorm(1, 1, 1, 4 * channels, **factory)
        self.pwconv2 = nn.Linear(4 * channels, channels, **factory)
        self.layer_scale_parameter = new_layer_scale(channels, config.layer_scale_init_value, **factory)
        self.drop_path = ConvNextDropPath(drop_path)
        paths = ("dwconv",), ("layernorm",), ("pwconv1",), ("pwconv2",), ("grn",) if config.version == 2 else None
        self.declare(*paths, "layer_scale_parameter", config.activation)
        self.fused = fused

    def branch(self, x: Tensor) -> Tensor:
        """γ · fc2(grn(act(fc1(LayerNorm(dwconv(x)))))) by calling the layers: (N, C, H, W) to (N, H, W, C)."""
        h = ACTIVATION_FUNCTIONS[self.act_name](self.pwconv1(self.layernorm(self.dwconv(x).permute(0, 2, 3, 1))))
        z = self.pwconv2(self.grn(h) if "grn" in self._modules else h)
        return z if self.layer_scale_parameter is None else self.layer_scale_parameter * z


class ConvNextEmbeddings(PatchLayer):
    """The stem: patch convolution, then LayerNorm, (N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋), channels_last."""

    def __init__(self, config: ConvNextConfig, fused: bool, **factory: Any):
        super().__init__()
        channels, patch = config.hidden_sizes[0], config.patch_shape
        self.patch_embeddings = nn.Conv2d(config.num_channels, channels, patch, stride=patch, **factory)
        self.layernorm = LayerNorm2d(channels, eps=config.norm_eps, **factory)
        self.declare("patch_embeddings", "layernorm", stem=True, fused=fused)


class ConvNextStage(Stage):
    """A stage under transformers' names: downsampling_layer (empty in the first stage), layers."""

    def __init__(self, config: ConvNextConfig, index: int, rates: list[float], fused: bool, **factory: Any):
        super().__init__()
        channels = config.hidden_sizes[index]
        self.downsampling_layer = (
            Downsample(config.hidden_sizes[index - 1], channels, config.norm_eps, fused, **factory)
            if index > 0
            else nn.Sequential()
        )
        self.layers = nn.ModuleList(ConvNextLayer(config, channels, rate, fused, **factory) for rate in rates)
        self.declare("downsampling_layer", "layers", fused)


class ConvNextEncoder(nn.Module):
    """The stages."""

    def __init__(self, config: ConvNextConfig, fused: bool, **factory: Any):
        super().__init__()
        rates = enumerate(config.drop_path_rates)
        self.stages = nn.ModuleList(ConvNextStage(config, i, r, fused, **factory) for i, r in rates)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The stem's output to a tuple: that output, then the output of each stage."""
        return (x, *outputs_in_turn(self.stages, x))
