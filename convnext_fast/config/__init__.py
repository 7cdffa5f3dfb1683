"""`ConvNextConfig` and `ConvNextV2Config`, and what may stand in their fields."""

from .convnext import (
    ACTIVATIONS,
    MOST_SIDE,
    PROBLEM_TYPES,
    VARIANTS,
    ConvNextConfig,
    ConvNextV2Config,
)

__all__ = ["ACTIVATIONS", "MOST_SIDE", "PROBLEM_TYPES", "VARIANTS", "ConvNextConfig", "ConvNextV2Config"]
