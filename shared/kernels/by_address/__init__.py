"""Records and kernels that kernels are told the addresses of, which LLVM then has not to compile again."""
