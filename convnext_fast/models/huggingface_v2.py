"""ConvNeXt V2 with transformers' classes: those of `huggingface`, for a `ConvNextV2Config`."""

from __future__ import annotations

from ..config import ConvNextV2Config
from .huggingface import ConvNextBackbone, ConvNextForImageClassification, ConvNextModel


class ConvNextV2Model(ConvNextModel):
    """`ConvNextModel` of ConvNeXt V2; arguments, outputs and keys alike, and ``grn.…`` in each block."""

    config_class = ConvNextV2Config
    base_model_prefix = "convnextv2"


class ConvNextV2ForImageClassification(ConvNextForImageClassification):
    """`ConvNextForImageClassification` of ConvNeXt V2; keys ``convnextv2.…``, ``classifier.…``."""

    config_class = ConvNextV2Config
    base_model_prefix = "convnextv2"
    base_class = ConvNextV2Model


class ConvNextV2Backbone(ConvNextBackbone):
    """`ConvNextBackbone` of ConvNeXt V2; arguments, outputs and keys alike, and ``grn.…`` in each block."""

    config_class = ConvNextV2Config
    base_model_prefix = "convnextv2"
