"""Training steps and the training loop, independent of networks, data sets and configs."""
