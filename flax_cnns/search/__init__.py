"""Searches over many runs: each of their trials is a run in a directory of its own."""
