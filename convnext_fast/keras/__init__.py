"""ConvNeXt and V2 with the API of transformers' TensorFlow classes: Keras 3 models for TensorFlow, JAX and PyTorch."""

import os

from ..console import how_to_install

try:
    import keras
except ImportError as error:
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    wanted = f"{how_to_install('tensorflow')}; or {how_to_install('keras')}, and KERAS_BACKEND=torch or jax"
    missing = "Keras" if error.name == "keras" else f"Keras's backend {backend} ({error})"
    raise ImportError(f"the TFConvNext classes need {missing}: {wanted}", name=error.name) from None
if int(keras.__version__.partition(".")[0]) < 3:
    raise ImportError(f"this is Keras {keras.__version__}, expected 3.15 or later: {how_to_install('keras')}")

from .models import (
    TFConvNextForImageClassification,
    TFConvNextModel,
    TFConvNextV2ForImageClassification,
    TFConvNextV2Model,
)

__all__ = [
    "TFConvNextForImageClassification",
    "TFConvNextModel",
    "TFConvNextV2ForImageClassification",
    "TFConvNextV2Model",
]
