"""The commands of `experiments.benchmark`, one subject per file."""
