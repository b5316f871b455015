"""Ablations: rows of a sweep times seeds, each cell a run, and the paired report."""
