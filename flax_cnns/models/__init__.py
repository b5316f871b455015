"""One family of networks a file, each with its `PAPER` and its table `VARIANTS`."""
