"""Ablations: each row of a sweep is trained with several seeds, and rows are compared in pairs."""
