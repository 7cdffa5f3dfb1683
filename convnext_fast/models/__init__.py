"""The models: `ConvNext` with timm's contract, and the classes with transformers' names."""
