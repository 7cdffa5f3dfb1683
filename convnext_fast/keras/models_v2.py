"""ConvNeXt V2 with transformers' TensorFlow classes: those of `models`, for a `ConvNextV2Config`."""

from __future__ import annotations

import keras

from ..config import ConvNextV2Config
from .models import TFConvNextForImageClassification, TFConvNextModel


@keras.saving.register_keras_serializable("convnext_fast")
class TFConvNextV2Model(TFConvNextModel):
    """`TFConvNextModel` of ConvNeXt V2; arguments and outputs alike, and ``grn`` in each block."""

    config_class = ConvNextV2Config
    base_model_prefix = "convnextv2"


@keras.saving.register_keras_serializable("convnext_fast")
class TFConvNextV2ForImageClassification(TFConvNextForImageClassification):
    """`TFConvNextForImageClassification` of ConvNeXt V2; arguments and outputs alike, and ``grn`` in each block."""

    config_class = ConvNextV2Config
    base_model_prefix = "convnextv2"
