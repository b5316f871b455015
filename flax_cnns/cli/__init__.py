"""The commands. Each reads its flags and then calls the library; only then is JAX imported."""
