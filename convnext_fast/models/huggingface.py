"""ConvNeXt as transformers' classes: a model, a classifier and a backbone, each for V1 and for V2."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..config import ConvNextConfig, ConvNextV2Config
from ..config.base import alias
from .huggingface_layers import ConvNextEmbeddings, ConvNextEncoder
from .layers import LayerNorm2d
from .losses import classification_loss
from .outputs import BackboneOutput, BaseModelOutput, ImageClassifierOutput
from .pretrained import ConvNextPreTrainedModel
from .switches import check_image, init_weights


class ConvNextModel(ConvNextPreTrainedModel):
    """The model without a classifier; keys ``embeddings.…``, ``encoder.…``, ``layernorm.…``."""

    def _make(self, config: ConvNextConfig, fused: bool, **factory: Any) -> None:
        self.embeddings = ConvNextEmbeddings(config, fused, **factory)
        self.encoder = ConvNextEncoder(config, fused, **factory)
        self.layernorm = nn.LayerNorm(config.hidden_sizes[-1], eps=config.layer_norm_eps, **factory)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | Sequence[int] | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """pixel_values (N, num_channels, H, W) to a `BaseModelOutput`, or its tuple with ``return_dict=False``.

        ``output_hidden_states``: True for all, False for none, or indices; by default the configuration's value.
        ``output_attentions`` has no effect: the model has no attentions.
        """
        check_image(pixel_values, self.config, "pixel_values")
        states = self._states(pixel_values)
        output = BaseModelOutput(
            last_hidden_state=states[-1],
            pooler_output=self.layernorm(states[-1].mean((2, 3))),
            hidden_states=self._hidden_states(states, output_hidden_states),
        )
        return self._returned(output, return_dict)


class ConvNextForImageClassification(ConvNextPreTrainedModel):
    """`ConvNextModel` with a linear classifier on the pooled features; keys ``convnext.…``, ``classifier.…``.

    A configuration with no labels makes a model without a classifier.
    """

    base_class = ConvNextModel

    def _make(self, config: ConvNextConfig, fused: bool, **factory: Any) -> None:
        self.num_labels = count = config.num_labels
        self.add_module(self.base_model_prefix, self.base_class(config, fused=fused, **factory))
        self.classifier = nn.Linear(config.hidden_sizes[-1], count, **factory) if count else nn.Identity()
        init_weights(self.classifier, config.initializer_range)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | Sequence[int] | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """pixel_values (N, num_channels, H, W) to an `ImageClassifierOutput`, with a loss if labels are given.

        The loss follows ``config.problem_type``, or the labels if that is None; see `losses.classification_loss`.
        """
        wanted = self._wanted_states(output_hidden_states)
        base = self.base_model(pixel_values, output_hidden_states=wanted, return_dict=True)
        logits = self.classifier(base.pooler_output)
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        return self._returned(
            ImageClassifierOutput(loss=loss, logits=logits, hidden_states=base.hidden_states), return_dict
        )


class ConvNextBackbone(ConvNextPreTrainedModel):
    """Feature maps for detection and segmentation; keys ``embeddings.…``, ``encoder.…``, ``hidden_states_norms.…``.

    ``config.out_features`` chooses the maps.

    Attributes:
        out_features, out_indices, channels: names, indices and widths of the maps returned. The first two are those of
            the configuration, and may be assigned if the new maps have a LayerNorm.
        stage_names, num_features: names and widths of all maps, returned or not.
    """

    has_attentions = False

    def _make(self, config: ConvNextConfig, fused: bool, **factory: Any) -> None:
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.embeddings = ConvNextEmbeddings(config, fused, **factory)
        self.encoder = ConvNextEncoder(config, fused, **factory)
        self.hidden_states_norms = nn.ModuleDict(
            {
                name: LayerNorm2d(width, eps=config.norm_eps, **factory)
                for name, width in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    stage_names = property(lambda self: self.config.stage_names)
    out_features, out_indices = alias("config.out_features"), alias("config.out_indices")

    @property
    def backbone_type(self) -> Any:
        """The member TRANSFORMERS of transformers' ``BackboneType``, or its value if that is not loaded."""
        kinds = getattr(sys.modules.get("transformers.backbone_utils"), "BackboneType", str)
        return kinds("transformers")

    @property
    def channels(self) -> list[int]:
        """Widths of the maps returned."""
        return [self.num_features[i] for i in self.out_indices]

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Width of every map, by name."""
        return dict(zip(self.stage_names, self.num_features, strict=True))

    def forward_with_filtered_kwargs(self, *args: Any, **options: Any) -> Any:
        """`forward`, without the options that it does not know. Models with a backbone call this."""
        known = inspect.signature(self.forward).parameters
        return self(*args, **{name: value for name, value in options.items() if name in known})

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | Sequence[int] | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """pixel_values (N, num_channels, H, W) to a `BackboneOutput`, each map after its own LayerNorm."""
        check_image(pixel_values, self.config, "pixel_values")
        states = self._states(pixel_values)
        chosen = zip(self.out_features, self.out_indices, strict=True)
        maps = tuple(self.hidden_states_norms[name](states[i]) for name, i in chosen)
        hidden = self._hidden_states(states, output_hidden_states)
        return self._returned(BackboneOutput(feature_maps=maps, hidden_states=hidden), return_dict)


class ConvNextV2Model(ConvNextModel):
    """`ConvNextModel` of ConvNeXt V2: the same arguments, outputs and keys, plus ``grn.…`` in each block."""

    config_class = ConvNextV2Config
    base_model_prefix = "convnextv2"


class ConvNextV2ForImageClassification(ConvNextForImageClassification):
    """`ConvNextForImageClassification` of ConvNeXt V2; keys ``convnextv2.…``, ``classifier.…``."""

    config_class = ConvNextV2Config
    base_model_prefix = "convnextv2"
    base_class = ConvNextV2Model


class ConvNextV2Backbone(ConvNextBackbone):
    """`ConvNextBackbone` of ConvNeXt V2: the same arguments, outputs and keys, plus ``grn.…`` in each block."""

    config_class = ConvNextV2Config
    base_model_prefix = "convnextv2"
