"""The stem and the downsampling layer: convolutions of non-overlapping patches, with their LayerNorm."""
