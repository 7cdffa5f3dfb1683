"""`ConvNextConfig` and `ConvNextV2Config`, and the values that their fields may have."""

from .convnext import (
    ACTIVATIONS,
    MOST_SIDE,
    PROBLEM_TYPES,
    VARIANTS,
    ConvNextConfig,
    ConvNextV2Config,
)

__all__ = ["ACTIVATIONS", "MOST_SIDE", "PROBLEM_TYPES", "VARIANTS", "ConvNextConfig", "ConvNextV2Config"]
