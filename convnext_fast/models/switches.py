"""What every ConvNeXt model here shares: run-time switches, input checks, and initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..backends import choose
from ..backends.cpu import llvm
from ..config import ConvNextConfig
from ..ops import call
from .freezing import check_has_graphs, freeze, is_frozen, state_of, unfreeze
from .layers import ConvNextBlockBase, OwnModule
from .plan import follow
from .whole_runs import WholeRuns, outputs_of


class ConvNextSwitches(nn.Module):
    """Mix-in of run-time switches for a model made of `ConvNextBlockBase` blocks."""

    config: ConvNextConfig

    def __init__(self) -> None:
        super().__init__()
        self._whole_runs = WholeRuns()

    def blocks(self) -> list[ConvNextBlockBase]:
        """All blocks, in order."""
        return [module for module in self.modules() if isinstance(module, ConvNextBlockBase)]

    @property
    def fused(self) -> bool:
        """Whether the fused ops run; assign to switch a whole model."""
        return all(block.fused for block in self.blocks())

    @fused.setter
    def fused(self, value: bool) -> None:
        if not value:
            self.unfreeze()
        for module in self.modules():
            if isinstance(module, OwnModule):
                module.fused = bool(value)

    @property
    def recompute(self) -> int:
        """What the backward pass recomputes, 0, 1 or 2 (see `ops.convnext_block`); assign to change it."""
        return max((block.recompute for block in self.blocks()), default=1)

    @recompute.setter
    def recompute(self, level: int) -> None:
        if level not in (0, 1, 2):
            raise ValueError(f"recompute is {level!r}: expected 0, 1 or 2")
        for block in self.blocks():
            block.recompute = level

    def backend_for(self, x: Tensor) -> choose.Name:
        """Where the blocks run for an input: "triton", "cpu", "aten" or "reference" (see `choose.select`).

        "cpu" if the kernels for x86 CPUs support every block; in ConvNeXt V2 all blocks must be frozen, too.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}: expected a tensor")
        if not self.fused:
            return "reference"
        backend = choose.select(x.device, call.compute_dtype(x))
        if backend != "cpu":
            return backend
        if self.config.version == 2 and not all(map(is_frozen, self.blocks())):
            return "aten"
        plans = [(block, state_of(block).plan) for block in self.blocks()]
        sizes = {(*follow(block, plan.fc1).weight.shape[::-1], plan.act) for block, plan in plans}
        return "cpu" if all(llvm.serves_block(*size) for size in sizes) else "aten"

    def run_whole(self, parts: Sequence[nn.Module], x: Tensor, last: bool = False) -> list[Tensor] | None:
        """The outputs of the modules ``parts``, or of the last one, by one run of steps; None if that is impossible."""
        return outputs_of(self._whole_runs, None, parts, x, last)

    def freeze(self, cuda_graph: bool = False) -> Any:
        """Prepare the model for inference only, and return it.

        Sets evaluation mode, turns off the parameters' gradients, and makes the fused path compute with folded copies
        of the weights: each block's LayerNorm affine and layer scale are folded into its linear layers, and the affine
        of a downsampling layer into its convolution. The copies follow the parameters: after a parameter or a layer is
        replaced, changed in place, moved or converted, the next call folds again, in a compiled model too. A few kinds
        of writes are not noticed (see `ops.folded_weights`); after those, freeze again. `train` and `load_state_dict`
        undo freezing.

        Args:
            cuda_graph: on NVIDIA GPUs, capture what runs between the image and the last feature map as a CUDA graph at
                the third call with the same shape, dtype and strides, and replay it from then on. The graphs of the
                eight kinds of inputs used last are kept, with their memory. Changed weights are captured again. The
                results are new tensors. A replay costs two copies, so it pays for small batches, where a GPU waits for
                the CPU. Freezing again without it turns this off.

        Raises:
            ValueError: ``fused`` is False, so there is nothing to fold; or ``cuda_graph`` is set, and the model is not
                on a CUDA device.
        """
        if not self.fused:
            raise ValueError("freeze() folds weights for the fused path: expected a model with fused=True")
        if cuda_graph:
            check_has_graphs(self)
        self.eval()
        for module in self.modules():
            if state_of(module) is not None:
                freeze(module, cuda_graph)
        rest = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.requires_grad_(False)
        self._trainable_before_freeze = rest | vars(self).get("_trainable_before_freeze", set())
        return self

    def unfreeze(self) -> Any:
        """Undo `freeze`, but stay in evaluation mode; return the model."""
        for module in self.modules():
            unfreeze(module)
        trainable = vars(self).pop("_trainable_before_freeze", set())
        for name, parameter in self.named_parameters():
            if name in trainable:
                parameter.requires_grad_(True)
        return self

    @torch.no_grad()
    def initialise(self, name: str) -> None:
        """Give one of this model's parameters the values that a new model starts with."""
        path, _, kind = name.rpartition(".")
        layer = self.get_submodule(path)
        parameter = getattr(layer, kind)
        if isinstance(layer, ConvNextBlockBase):
            parameter.fill_(self.config.layer_scale_init_value)
        elif kind == "weight" and isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(parameter, std=self.config.initializer_range, a=-2.0, b=2.0)
        else:
            parameter.fill_(float(kind == "weight" and isinstance(layer, nn.LayerNorm)))

    def train(self, mode: bool = True) -> Any:
        """As `torch.nn.Module.train`; training mode undoes freezing."""
        if mode:
            self.unfreeze()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args, **kwargs)


def check_image(image: Any, config: ConvNextConfig, name: str) -> None:
    """Raise TypeError or ValueError unless ``image`` is a (N, C, H, W) batch, large enough for the model's strides."""
    if isinstance(image, torch.fx.Proxy):
        return
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} is a {type(image).__name__}: expected a tensor (N, {config.num_channels}, H, W)")
    if not image.is_floating_point():
        raise TypeError(f"{name} has dtype {image.dtype}: expected a floating dtype (rescale and normalise the image)")
    if image.dim() != 4 or image.shape[1] != config.num_channels:
        raise ValueError(f"{name} has shape {tuple(image.shape)}: expected (N, {config.num_channels}, H, W)")
    least = [side << (config.num_stages - 1) for side in config.patch_shape]
    if image.shape[2] < least[0] or image.shape[3] < least[1]:
        raise ValueError(f"{name} is {image.shape[2]}×{image.shape[3]} pixels: expected at least {least[0]}×{least[1]}")


@torch.no_grad()
def init_weights(model: nn.Module, std: float) -> None:
    """Draw weights of convolutions and linear layers from N(0, std²) cut at ±2; set biases to 0 (as the official code).

    Weights that are already initialised or loaded stay.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not hasattr(module.weight, "_is_hf_initialized"):
            nn.init.trunc_normal_(module.weight, std=std, a=-2.0, b=2.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # else the post_init of a transformers model that holds it overwrites it
