"""Surgical loading: rules decide where each leaf of a network comes from, or that it stays fresh."""
