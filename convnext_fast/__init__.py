"""convnext_fast: a drop-in ConvNeXt whose blocks run on fused Triton kernels."""

from .config import VARIANTS, ConvNextConfig, ConvNextV2Config
from .fusion.apply import FuseReport, fuse, unfuse
from .images.processor import ConvNextFeatureExtractor, ConvNextImageProcessor
from .models.convnext import ConvNext
from .models.graphed import graphed
from .models.huggingface import ConvNextBackbone, ConvNextForImageClassification, ConvNextModel
from .models.huggingface_v2 import ConvNextV2Backbone, ConvNextV2ForImageClassification, ConvNextV2Model
from .triton_import import install

install()
del install

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
