"""What is known about the kernels without running them: registers, spills, bytes, instructions, modelled times."""
