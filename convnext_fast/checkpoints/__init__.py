"""Reading and writing checkpoints in the formats of timm, transformers, torchvision and the official repository."""
