"""Where the fused ops run: Triton kernels on a GPU, x86 kernels or ATen calls on a CPU, or the plain reference."""
