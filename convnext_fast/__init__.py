"""convnext_fast: a drop-in ConvNeXt whose blocks run on fused Triton kernels."""

from .config import VARIANTS, ConvNextConfig
from .model import ConvNext

__version__ = "0.1.0"

__all__ = ["VARIANTS", "ConvNext", "ConvNextConfig", "__version__"]
