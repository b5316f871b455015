"""Processes: launching several, stopping on signals, safe output, the compilation cache."""
