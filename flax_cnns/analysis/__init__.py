"""Look at a network, or at runs, without training: cost, timing, statistics, devices."""
