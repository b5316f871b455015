"""Metrics of a network on a split; each example counts once."""
