"""The fused ops on a CPU: kernels compiled by LLVM for x86 processors, and ATen calls for everything else."""
