"""Grafting: rules decide where each leaf of a network comes from, or leave the leaf fresh."""
