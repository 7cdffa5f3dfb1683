"""convnext_fast: a drop-in ConvNeXt whose blocks run on fused Triton kernels."""

from .config import VARIANTS, ConvNextConfig
from .fusion.apply import FuseReport, fuse, unfuse
from .images.processor import ConvNextFeatureExtractor, ConvNextImageProcessor
from .models.convnext import ConvNext
from .models.graphed import graphed
from .models.huggingface import ConvNextBackbone, ConvNextForImageClassification, ConvNextModel

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
    "FuseReport",
    "__version__",
    "fuse",
    "graphed",
    "unfuse",
]
