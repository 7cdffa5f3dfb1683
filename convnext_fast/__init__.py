"""convnext_fast: a drop-in ConvNeXt whose blocks run on fused Triton kernels."""

from .config import VARIANTS, ConvNextConfig
from .fuse import FuseReport, fuse, unfuse
from .huggingface import ConvNextBackbone, ConvNextForImageClassification, ConvNextModel
from .image_processor import ConvNextFeatureExtractor, ConvNextImageProcessor
from .model import ConvNext

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
    "unfuse",
]
