"""MANY runs: ablations, fine-tuning, searches."""
