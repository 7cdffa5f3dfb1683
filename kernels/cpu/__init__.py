"""Kernels for x86 CPUs, emitted as LLVM IR by llvmlite and compiled for the machine they run on."""
