"""The building blocks as modules: the ConvNeXt block, the stem, the downsampling layer and the stage.

All take and return (N, C, H, W) tensors, in channels_last memory from the stem on, so that the (N, H, W, C) views that
the ops work on are free. Each module declares a plan (see `fused_module`): with ``fused`` set, the ``forward`` of the
inner `torch.nn` layers is called only if those layers were changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backends.reference import ACTIVATION_FUNCTIONS, global_response_norm
from .drop_path import DropPath
from .freezing import set_plan, state_of
from .fused_module import FusedModule
from .plan import BlockPlan, ChainPlan, PatchPlan, Path, watch

KERNEL_SIZE = 7

_LIVE = ("eps", "rate")
"""Settings of layers that every forward reads again."""


def _of_plan(name: str, convert: Callable[[Any], Any] = lambda value: value) -> Any:
    """A property that reads and replaces a field of the module's plan."""
    return property(
        lambda self: getattr(state_of(self).plan, name),
        lambda self, value: set_plan(self, state_of(self).plan._replace(**{name: convert(value)})),
    )


class OwnModule(FusedModule):
    """A `FusedModule` of this package.

    Attributes:
        fused: run the fused ops; otherwise call the layers.
    """

    fused: bool = _of_plan("fused", bool)


class ConvNextBlockBase(OwnModule):
    """x + drop_path(γ · fc2(grn(act(fc1(LayerNorm(dwconv(x))))))); subclasses name the layers.

    V1 has no grn, V2 no γ.

    Attributes:
        fused: run `ops.convnext_block` or `ops.convnext_v2_block`; otherwise call the layers.
        recompute: what the fused backward recomputes (see `ops.convnext_block`).
        act_name: activation, one of ``config.ACTIVATIONS``.
    """

    drop_path: DropPath
    recompute = _of_plan("recompute")
    act_name = _of_plan("act")

    def declare(
        self, dwconv: Path, norm: Path, fc1: Path, fc2: Path, grn: Path | None, gamma: str, act: str, *others: Path
    ) -> None:
        """Declare where the layers are; ``others``: further modules that the fused forward does not call."""
        layers = [dwconv, norm, fc1, fc2, *others, ("drop_path",)] + ([] if grn is None else [grn])
        watched = tuple(watch(self, path, *_LIVE) for path in layers)
        plan = BlockPlan(dwconv, norm, fc1, fc2, gamma, ("drop_path",), "rate", act, watched, own=True)
        set_plan(self, plan if grn is None else plan._replace(grn=grn, grn_names=("weight", "bias")))

    def branch(self, x: Tensor) -> Tensor:
        """γ · fc2(grn(act(fc1(LayerNorm(dwconv(x)))))) by calling the layers: (N, C, H, W) to (N, H, W, C)."""
        raise NotImplementedError

    def _plain_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.branch(x).permute(0, 3, 1, 2))

    def extra_repr(self) -> str:
        """The block's options, for `repr`."""
        return f"act={self.act_name}, fused={self.fused}"


def new_layer_scale(channels: int, value: float, **factory: Any) -> nn.Parameter | None:
    """γ of a block, (C,), or None if ``value`` is 0 or less."""
    return nn.Parameter(torch.full((channels,), float(value), **factory)) if value > 0 else None


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's `ops.global_response_norm`; ``shape``: of each parameter, K elements for inputs (N, H, W, K)."""

    def __init__(self, *shape: int, **factory: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, **factory))
        self.bias = nn.Parameter(torch.zeros(shape, **factory))

    def forward(self, h: Tensor) -> Tensor:
        """(N, H, W, K) to the same."""
        return global_response_norm(h, self.weight, self.bias)


class Mlp(nn.Module):
    """The two linear layers of a block, the activation between them and, in ConvNeXt V2, the global response norm."""

    def __init__(self, channels: int, hidden: int, act: str, grn: bool, **factory: Any):
        super().__init__()
        self.act_name = act
        self.fc1 = nn.Linear(channels, hidden, **factory)
        if grn:
            self.grn = GlobalResponseNorm(hidden, **factory)
        self.fc2 = nn.Linear(hidden, channels, **factory)

    def forward(self, n: Tensor) -> Tensor:
        """(N, H, W, C) to the same."""
        h = ACTIVATION_FUNCTIONS[self.act_name](self.fc1(n))
        return self.fc2(self.grn(h) if "grn" in self._modules else h)


class ConvNextBlock(ConvNextBlockBase):
    """The block under timm's names: conv_dw, norm, mlp.fc1, mlp.grn, mlp.fc2, gamma."""

    def __init__(
        self,
        channels: int,
        *,
        act: str = "gelu",
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        grn: bool = False,
        fused: bool = True,
        **factory: Any,
    ):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=channels, **factory)
        self.norm = nn.LayerNorm(channels, eps=eps, **factory)
        self.mlp = Mlp(channels, 4 * channels, act, grn, **factory)
        self.gamma = new_layer_scale(channels, layer_scale, **factory)
        self.drop_path = DropPath(drop_path)
        response = ("mlp", "grn") if grn else None
        self.declare(("conv_dw",), ("norm",), ("mlp", "fc1"), ("mlp", "fc2"), response, "gamma", act, ("mlp",))
        self.fused = fused

    @property
    def act_name(self) -> str:
        """Activation, one of ``config.ACTIVATIONS``."""
        return self.mlp.act_name

    @act_name.setter
    def act_name(self, name: str) -> None:
        self.mlp.act_name = name
        plan = state_of(self).plan
        watched = tuple(layer._replace(values=(name,)) if layer.path == ("mlp",) else layer for layer in plan.watched)
        set_plan(self, plan._replace(act=name, watched=watched))

    def branch(self, x: Tensor) -> Tensor:
        """γ · fc2(grn(act(fc1(LayerNorm(dwconv(x)))))) by calling the layers: (N, C, H, W) to (N, H, W, C)."""
        z = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        return z if self.gamma is None else self.gamma * z

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # timm's conv_mlp models hold the same linear layers as 1×1 convolutions.
        for name in ("mlp.fc1.weight", "mlp.fc2.weight"):
            weight = state_dict.get(prefix + name)
            if weight is not None and weight.dim() == 4 and weight.shape[2:] == (1, 1):
                state_dict[prefix + name] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchLayer(OwnModule):
    """A convolution of non-overlapping patches and a LayerNorm, in either order."""

    def declare(self, conv: str, norm: str, stem: bool, fused: bool) -> None:
        """Declare the names of the two layers; ``stem``: whether the convolution comes first."""
        watched = tuple(watch(self, (name,), *_LIVE) for name in self._modules)
        set_plan(self, PatchPlan((norm,), (conv,), stem, watched, fused=fused))

    def _plain_forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            x = layer(x)
        return x


class Stem(PatchLayer, nn.Sequential):
    """Patch convolution, then LayerNorm: (N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋), channels_last."""

    def __init__(
        self, in_channels: int, channels: int, patch: tuple[int, int], eps: float, fused: bool, **factory: Any
    ):
        conv = nn.Conv2d(in_channels, channels, patch, stride=patch, **factory)
        super().__init__(conv, LayerNorm2d(channels, eps=eps, **factory))
        self.declare("0", "1", stem=True, fused=fused)


class Downsample(PatchLayer, nn.Sequential):
    """LayerNorm, then 2×2 convolution of stride 2: (N, C, H, W) to (N, C', ⌊H/2⌋, ⌊W/2⌋), channels_last."""

    def __init__(self, in_channels: int, channels: int, eps: float, fused: bool, **factory: Any):
        norm = LayerNorm2d(in_channels, eps=eps, **factory)
        super().__init__(norm, nn.Conv2d(in_channels, channels, 2, stride=2, **factory))
        self.declare("1", "0", stem=False, fused=fused)


class Stage(OwnModule):
    """Downsampling, then blocks: (N, C, H, W) to (N, C', ⌊H/2⌋, ⌊W/2⌋), or of the same size in the first stage.

    Attributes:
        checkpointing: None, or the options with which `torch.utils.checkpoint.checkpoint` runs each block in training.
    """

    def declare(self, downsample: str, blocks: str, fused: bool) -> None:
        """Declare the names of the two modules."""
        self.checkpointing: dict[str, Any] | None = None
        self._names = downsample, blocks
        set_plan(self, ChainPlan(self._names, fused=fused))

    def _plain_forward(self, x: Tensor) -> Tensor:
        downsample, blocks = map(self._modules.__getitem__, self._names)
        x = downsample(x)
        checkpoints = self.checkpointing is not None and self.training and torch.is_grad_enabled()
        if not checkpoints and not isinstance(blocks, nn.ModuleList):
            return blocks(x)
        for block in blocks:
            x = checkpoint(block, x, **self.checkpointing) if checkpoints else block(x)
        return x
