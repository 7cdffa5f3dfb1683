"""ConvNeXt with transformers' classes: `ConvNextModel`, `ConvNextForImageClassification`, `ConvNextBackbone`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..backends.reference import ACTIVATION_FUNCTIONS
from ..checkpoints.load_save import load_model, save_model
from ..config import ConvNextConfig
from .drop_path import ConvNextDropPath
from .fused_module import layer_norm_2d, outputs_in_turn
from .layers import (
    KERNEL_SIZE,
    ConvNextBlockBase,
    Downsample,
    GlobalResponseNorm,
    Parts,
    PatchLayer,
    Stage,
    new_layer_scale,
)
from .losses import classification_loss
from .outputs import BackboneOutput, BaseModelOutput, ImageClassifierOutput, ModelOutput
from .switches import ConvNextSwitches, check_image, init_weights
from .whole_runs import is_untouched

Output = TypeVar("Output", bound=ModelOutput)


class ConvNextLayer(ConvNextBlockBase):
    """The block under transformers' names: dwconv, layernorm, pwconv1, pwconv2, layer_scale_parameter, of V2 grn."""

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

    def parts(self) -> Parts:
        """The layers of this block."""
        return Parts(self.dwconv, self.layernorm, self.pwconv1, self.pwconv2, self.layer_scale_parameter)

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
        self.layernorm = nn.LayerNorm(channels, eps=config.norm_eps, **factory)
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
        """The stem's output to (it, and the output of each stage)."""
        return (x, *outputs_in_turn(self.stages, x))


class ConvNextPreTrainedModel(ConvNextSwitches):
    """What the three models share."""

    config_class = ConvNextConfig
    base_model_prefix = "convnext"
    main_input_name = "pixel_values"
    checkpoint_format = "transformers"

    def __init__(self, config: ConvNextConfig):
        super().__init__()
        kind = self.config_class
        if not isinstance(config, kind) or config.version != kind.version:
            raise TypeError(f"config is a {type(config).__name__}: expected a convnext_fast.{kind.__name__}")
        self.config = config

    def _states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """What comes out of the stem and of each stage."""
        embeddings, encoder, states = self.embeddings, self.encoder, None
        if is_untouched(encoder, (ConvNextEncoder.forward,)):
            states = self.run_whole((embeddings, *encoder.stages), pixel_values)
        return encoder(embeddings(pixel_values)) if states is None else tuple(states)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Any:
        """A model with the weights of a folder, file or hub id; see `load_model`."""
        return load_model(cls, source, **options)

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Write ``config.json`` and the weights; options as of `save_model`, such as ``max_shard_size``."""
        save_model(self, directory, **options)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; ``exclude_embeddings``, from transformers, has no effect here."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute whole blocks in the backward pass; ``recompute`` is cheaper.

        ``gradient_checkpointing_kwargs``: further arguments of `torch.utils.checkpoint.checkpoint`.
        """
        self._set_checkpointing({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        self._set_checkpointing(None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any stage recomputes its blocks."""
        return any(m.checkpointing is not None for m in self.modules() if isinstance(m, ConvNextStage))

    def _set_checkpointing(self, options: dict[str, Any] | None) -> None:
        for module in self.modules():
            if isinstance(module, ConvNextStage):
                module.checkpointing = options

    def _wants_hidden_states(self, asked: bool | None) -> bool:
        return bool(getattr(self.config, "output_hidden_states", False) if asked is None else asked)

    def _returned(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        wanted = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


class ConvNextModel(ConvNextPreTrainedModel):
    """The model without a classifier; keys ``embeddings.…``, ``encoder.…``, ``layernorm.…``.

    Args:
        config: the architecture.
        fused: run the fused ops; False runs plain eager PyTorch. Assign ``model.fused`` to switch.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: ConvNextConfig,
        *,
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embeddings = ConvNextEmbeddings(config, fused, **factory)
        self.encoder = ConvNextEncoder(config, fused, **factory)
        self.layernorm = nn.LayerNorm(config.hidden_sizes[-1], eps=config.layer_norm_eps, **factory)
        init_weights(self, config.initializer_range)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BaseModelOutput | tuple[Any, ...]:
        """pixel_values (N, num_channels, H, W) to a `BaseModelOutput`, or its tuple with ``return_dict=False``."""
        check_image(pixel_values, self.config, "pixel_values")
        states = self._states(pixel_values)
        output = BaseModelOutput(
            last_hidden_state=states[-1],
            pooler_output=self.layernorm(states[-1].mean((2, 3))),
            hidden_states=states if self._wants_hidden_states(output_hidden_states) else None,
        )
        return self._returned(output, return_dict)


class ConvNextForImageClassification(ConvNextPreTrainedModel):
    """`ConvNextModel` with a linear classifier on the pooled features; keys ``convnext.…``, ``classifier.…``.

    Args: as `ConvNextModel`. A configuration with no labels makes a model without a classifier.
    """

    base_class = ConvNextModel

    def __init__(
        self,
        config: ConvNextConfig,
        *,
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config)
        self.num_labels = config.num_labels
        base = self.base_class(config, fused=fused, device=device, dtype=dtype)
        self.add_module(self.base_model_prefix, base)
        width = config.hidden_sizes[-1]
        has_labels = config.num_labels > 0
        self.classifier: nn.Module = (
            nn.Linear(width, config.num_labels, device=device, dtype=dtype) if has_labels else nn.Identity()
        )
        init_weights(self.classifier, config.initializer_range)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """pixel_values (N, num_channels, H, W) to an `ImageClassifierOutput`, with a loss where labels are given.

        The loss follows ``config.problem_type`` or, where that is None, the labels; see `losses.classification_loss`.
        """
        wanted = self._wants_hidden_states(output_hidden_states)
        base = getattr(self, self.base_model_prefix)(pixel_values, output_hidden_states=wanted, return_dict=True)
        logits = self.classifier(base.pooler_output)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return self._returned(ImageClassifierOutput(loss, logits, base.hidden_states), return_dict)


class ConvNextBackbone(ConvNextPreTrainedModel):
    """Feature maps for detection and segmentation; keys ``embeddings.…``, ``encoder.…``, ``hidden_states_norms.…``.

    Args: as `ConvNextModel`. ``config.out_features`` chooses the maps.

    Attributes:
        out_features, out_indices, channels: names, indices and widths of the maps returned.
        stage_names, num_features: of all maps there are.
    """

    def __init__(
        self,
        config: ConvNextConfig,
        *,
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stage_names = config.stage_names
        self.out_features = list(config.out_features)
        self.out_indices = list(config.out_indices)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.embeddings = ConvNextEmbeddings(config, fused, **factory)
        self.encoder = ConvNextEncoder(config, fused, **factory)
        self.hidden_states_norms = nn.ModuleDict(
            {
                name: nn.LayerNorm(width, eps=config.norm_eps, **factory)
                for name, width in zip(self.out_features, self.channels, strict=True)
            }
        )
        init_weights(self, config.initializer_range)

    @property
    def channels(self) -> list[int]:
        """Widths of the maps returned."""
        return [self.num_features[i] for i in self.out_indices]

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Width of every map, by name."""
        return dict(zip(self.stage_names, self.num_features, strict=True))

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BackboneOutput | tuple[Any, ...]:
        """pixel_values (N, num_channels, H, W) to a `BackboneOutput`, each map after its own LayerNorm."""
        check_image(pixel_values, self.config, "pixel_values")
        states = self._states(pixel_values)
        chosen = zip(self.out_features, self.out_indices, strict=True)
        maps = tuple(layer_norm_2d(states[i], self.hidden_states_norms[name]) for name, i in chosen)
        hidden = states if self._wants_hidden_states(output_hidden_states) else None
        return self._returned(BackboneOutput(maps, hidden), return_dict)
