"""convnext_fast: a drop-in ConvNeXt on fused kernels, of Triton for GPUs and compiled for x86 CPUs."""

from typing import TYPE_CHECKING, Any

from .backends.triton_import import install
from .config import VARIANTS, ConvNextConfig, ConvNextV2Config
from .fusion.apply import fuse, unfuse
from .fusion.report import FuseReport
from .images.processor import ConvNextFeatureExtractor, ConvNextImageProcessor
from .models.convnext import ConvNext
from .models.graphed import graphed
from .models.huggingface import (
    ConvNextBackbone,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Backbone,
    ConvNextV2ForImageClassification,
    ConvNextV2Model,
)

install()
del install

if TYPE_CHECKING:
    from .keras import TFConvNextForImageClassification as TFConvNextForImageClassification
    from .keras import TFConvNextModel as TFConvNextModel
    from .keras import TFConvNextV2ForImageClassification as TFConvNextV2ForImageClassification
    from .keras import TFConvNextV2Model as TFConvNextV2Model

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "ConvNext",
    "ConvNextBackbone",
    "ConvNextConfig",
    "ConvNextFeatureExtractor",
    "ConvNextForImageClassification",
    "ConvNextImageProcessor",
    "ConvNextModel",
    "ConvNextV2Backbone",
    "ConvNextV2Config",
    "ConvNextV2ForImageClassification",
    "ConvNextV2Model",
    "FuseReport",
    "__version__",
    "fuse",
    "graphed",
    "unfuse",
]


_KERAS = {f"TFConvNext{version}{kind}" for version in ("", "V2") for kind in ("Model", "ForImageClassification")}


def __getattr__(name: str) -> Any:
    """The Keras models, which import Keras, only when they are asked for; see ``keras/README.md``."""
    if name in _KERAS:
        from . import keras

        return getattr(keras, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
