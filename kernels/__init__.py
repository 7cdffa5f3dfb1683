"""Triton kernels of ConvNeXt and their launchers, imported as ``convnext_fast.kernels``; in ``cpu`` those for x86 CPUs.

Each file reads from formula to device code to launcher. Launchers take contiguous tensors and allocate their outputs;
validation, autograd and the choice of path live in ``convnext_fast.ops``.
"""
