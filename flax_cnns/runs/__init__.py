"""One run: its directory, its parts, training, evaluation, prediction, its tables."""
