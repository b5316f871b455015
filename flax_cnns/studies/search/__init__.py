"""Searches: compound scaling of a network under a budget of MACs."""
