"""convnext_fast: a drop-in ConvNeXt whose blocks run on fused Triton kernels."""
