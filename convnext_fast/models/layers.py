"""The building blocks as modules: drop path, the ConvNeXt block, the stem and the downsampling layer.

All take and return (N, C, H, W) tensors, in channels_last memory from the stem on, so that the (N, H, W, C) views that
the ops work on are free. The inner `torch.nn` layers hold parameters under their usual names; with ``fused`` set their
own ``forward`` is not called, unless something was done to them (see `layered`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from .. import ops
from ..backends.reference import ACTIVATION_FUNCTIONS
from ..ops import call
from ..ops.folding import FrozenBlock, FrozenDownsample, freeze_block, freeze_downsample
from ..ops.views import as_nchw
from .freezing import Freezable
from .fused_module import Layered, Pair, in_turn
from .steps import Step, stepwise

KERNEL_SIZE = 7


class DropPath(nn.Module):
    """Stochastic depth per sample ("Deep Networks with Stochastic Depth"): a residual branch is dropped at ``rate``."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def draw(self, x: Tensor) -> Tensor | None:
        """The factor of each sample of x (N, …): 0, or 1/(1 − rate), as (N,); None where nothing is dropped.

        Draws from the random stream as timm does, so that one seed drops the same samples.
        """
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.rate
        kept = x.new_empty(x.shape[0]).bernoulli_(keep)
        return kept / keep if keep > 0.0 else kept

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) with each sample's factor applied."""
        factor = self.draw(x)
        return x if factor is None else x * factor.view(-1, 1, 1, 1)

    def extra_repr(self) -> str:
        """The rate, for `repr`."""
        return f"rate={self.rate:.3f}"


class Parts(NamedTuple):
    """The layers of a block, whatever its host library calls them."""

    dwconv: nn.Conv2d
    norm: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    gamma: nn.Parameter | None


@stepwise
class ConvNextBlockBase(Layered, Freezable):
    """x + drop_path(γ · fc2(act(fc1(LayerNorm(dwconv(x)))))); subclasses name the layers.

    Attributes:
        fused: run `ops.convnext_block`; otherwise call the layers.
        recompute: what the fused backward computes anew (see `ops.convnext_block`).
        act_name: activation, one of ``config.ACTIVATIONS``.
    """

    Frozen = FrozenBlock
    drop_path: DropPath

    act_name: str

    def __init__(self, fused: bool):
        super().__init__()
        self.fused = fused
        self.recompute = 1

    def parts(self) -> Parts:
        """The layers of this block."""
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """γ · fc2(act(fc1(LayerNorm(dwconv(x))))) by calling the layers: (N, C, H, W) to (N, H, W, C)."""
        raise NotImplementedError

    @property
    def eps(self) -> float:
        """Epsilon of the LayerNorm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        if not self.reads_weights():
            return x + self.drop_path(self.branch(x).permute(0, 3, 1, 2))
        nhwc, frozen = x.permute(0, 2, 3, 1), self.frozen
        if frozen is not None and not self.learns():
            if torch._C._is_any_autocast_enabled():  # to ask for γ takes as long as some kernels
                nhwc = _residual(nhwc, self.parts().gamma)
            y = ops.frozen_block(nhwc, *frozen, eps=self.eps, act=self.act_name)
        else:
            dwconv, norm, fc1, fc2, gamma = self.parts()
            args = (dwconv.weight, dwconv.bias, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
            options = {"eps": norm.eps, "act": self.act_name, "recompute": self.recompute}
            y = ops.convnext_block(nhwc, *args, gamma, self.drop_path.draw(x), **options)
        return as_nchw(y)

    def steps(self) -> list[Step] | None:
        """See `steps.stepwise`."""
        frozen = self.frozen
        if frozen is None or not self.stands(frozen):
            return None
        return [Step(tuple(frozen), self.eps, self.act_name)]

    def fold(self) -> FrozenBlock | None:
        """LayerNorm's affine and γ folded into the linear layers, and a copy of the convolution."""
        if self.change() is not None:
            return None
        dwconv, norm, fc1, fc2, gamma = self.parts()
        mlp = fc1.weight, fc1.bias, fc2.weight, fc2.bias, gamma
        return freeze_block(dwconv.weight, dwconv.bias, norm.weight, norm.bias, *mlp)

    def extra_repr(self) -> str:
        """The block's options, for `repr`."""
        return f"act={self.act_name}, fused={self.fused}"


def new_layer_scale(channels: int, value: float, **factory: Any) -> nn.Parameter | None:
    """γ of a block, (C,), or None for a ``value`` of 0 or less."""
    return nn.Parameter(torch.full((channels,), float(value), **factory)) if value > 0 else None


class Mlp(nn.Module):
    """The two linear layers of a block and the activation between them."""

    def __init__(self, channels: int, hidden: int, act: str, **factory: Any):
        super().__init__()
        self.act_name = act
        self.fc1 = nn.Linear(channels, hidden, **factory)
        self.fc2 = nn.Linear(hidden, channels, **factory)

    def forward(self, n: Tensor) -> Tensor:
        """(…, C) to the same."""
        return self.fc2(ACTIVATION_FUNCTIONS[self.act_name](self.fc1(n)))


class ConvNextBlock(ConvNextBlockBase):
    """The block under timm's names: conv_dw, norm, mlp.fc1, mlp.fc2, gamma."""

    def __init__(
        self,
        channels: int,
        *,
        act: str = "gelu",
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        fused: bool = True,
        **factory: Any,
    ):
        super().__init__(fused)
        self.conv_dw = nn.Conv2d(channels, channels, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=channels, **factory)
        self.norm = nn.LayerNorm(channels, eps=eps, **factory)
        self.mlp = Mlp(channels, 4 * channels, act, **factory)
        self.gamma = new_layer_scale(channels, layer_scale, **factory)
        self.drop_path = DropPath(drop_path)
        self.watch((("conv_dw",), ("norm",), ("mlp", "fc1"), ("mlp", "fc2")), (("mlp",), ("drop_path",)))

    def parts(self) -> Parts:
        """The layers of this block."""
        return Parts(self.conv_dw, self.norm, self.mlp.fc1, self.mlp.fc2, self.gamma)

    @property
    def act_name(self) -> str:  # type: ignore[override]
        """Activation, one of ``config.ACTIVATIONS``."""
        return self.mlp.act_name

    @act_name.setter
    def act_name(self, name: str) -> None:
        self.mlp.act_name = name

    @property
    def eps(self) -> float:
        """Epsilon of the LayerNorm."""
        return self.norm.eps

    def branch(self, x: Tensor) -> Tensor:
        """γ · fc2(act(fc1(LayerNorm(dwconv(x))))) by calling the layers: (N, C, H, W) to (N, H, W, C)."""
        z = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        return z if self.gamma is None else self.gamma * z

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # timm's conv_mlp models hold the same linear layers as 1×1 convolutions.
        for name in ("mlp.fc1.weight", "mlp.fc2.weight"):
            weight = state_dict.get(prefix + name)
            if weight is not None and weight.dim() == 4 and weight.shape[2:] == (1, 1):
                state_dict[prefix + name] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


@stepwise
class Stem(Pair):
    """Patch convolution, then LayerNorm: (N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋)."""

    def __init__(
        self, in_channels: int, channels: int, patch: tuple[int, int], eps: float, fused: bool, **factory: Any
    ):
        conv = nn.Conv2d(in_channels, channels, patch, stride=patch, **factory)
        super().__init__(conv, nn.LayerNorm(channels, eps=eps, **factory), fused)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋), channels_last."""
        return patchify_stem(image, *self) if self.reads_weights() else in_turn(self, image)

    def steps(self) -> list[Step] | None:
        """See `steps.stepwise`."""
        return stem_steps(self, *self)


@stepwise
class Downsample(Freezable, Pair):
    """LayerNorm, then 2×2 convolution of stride 2: (N, C, H, W) to (N, C', ⌊H/2⌋, ⌊W/2⌋)."""

    Frozen = FrozenDownsample

    def __init__(self, in_channels: int, channels: int, eps: float, fused: bool, **factory: Any):
        norm = nn.LayerNorm(in_channels, eps=eps, **factory)
        super().__init__(norm, nn.Conv2d(in_channels, channels, 2, stride=2, **factory), fused)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', ⌊H/2⌋, ⌊W/2⌋), channels_last."""
        if not self.reads_weights():
            return in_turn(self, x)
        return downsample(x, *self, None if self.learns() else self.frozen)

    def steps(self) -> list[Step] | None:
        """See `steps.stepwise`."""
        frozen = self.frozen
        return None if frozen is None or not self.stands(frozen) else [Step(tuple(frozen), self[0].eps)]

    def fold(self) -> FrozenDownsample | None:
        """LayerNorm's affine folded into the convolution."""
        return None if self.change() is not None else fold_downsample(*self)


@torch.fx.wrap
def _residual(x: Tensor, gamma: Tensor | None) -> Tensor:
    """x in the dtype of a block's result: autocast leaves γ, though it be folded away, and what is summed in theirs."""
    return x if gamma is None or not call.autocasts(x) else x.to(torch.promote_types(x.dtype, gamma.dtype))


def patchify_stem(image: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm) -> Tensor:
    """The stem by the weights of its layers: (N, C, H, W) to (N, C', ⌊H/kh⌋, ⌊W/kw⌋)."""
    y = ops.patchify_stem(image, conv.weight, conv.bias, norm.weight, norm.bias, eps=norm.eps)
    return as_nchw(y)


def stem_steps(module: Layered, *layers: nn.Module) -> list[Step] | None:
    """What a stem does whose layers are a convolution and a LayerNorm; see `steps.stepwise`."""
    if not module.stands(None):
        return None
    conv, norm = layers
    return [Step((conv.weight, conv.bias, norm.weight, norm.bias), norm.eps)]


def downsample(x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d, frozen: FrozenDownsample | None) -> Tensor:
    """A downsampling layer by the weights of its layers, or by what is ``frozen`` of them, on (N, C, H, W)."""
    nhwc = x.permute(0, 2, 3, 1)
    if frozen is not None:
        y = ops.frozen_downsample(nhwc, *frozen, eps=norm.eps)
    else:
        y = ops.downsample(nhwc, norm.weight, norm.bias, conv.weight, conv.bias, eps=norm.eps)
    return as_nchw(y)


def fold_downsample(norm: nn.LayerNorm, conv: nn.Conv2d) -> FrozenDownsample:
    """LayerNorm's affine folded into the convolution."""
    return freeze_downsample(norm.weight, norm.bias, conv.weight, conv.bias)
