"""Triton kernels of ConvNeXt and their launchers, imported as ``convnext_fast.kernels``; ``cpu``: for x86 CPUs.

Each file reads from formula to device code to launcher. Launchers take contiguous tensors and allocate their outputs;
argument checks and autograd are in ``convnext_fast.ops``, the choice of path in ``convnext_fast.backends``.
"""
