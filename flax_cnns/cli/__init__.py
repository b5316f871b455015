"""The commands. Each reads its flags and calls the library; JAX is imported only after that."""
