"""A single run: its directory, components, training, evaluation, prediction and tables."""
