"""Training steps and the loop around them. Knows no network, no data set and no config."""
