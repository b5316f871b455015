"""The commands: flags in, one call of the library, honest exit codes. No JAX before the flags."""
