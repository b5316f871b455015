"""Analysis of networks, runs and devices: cost, timing, statistics, plots."""
