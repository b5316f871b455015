"""Data, from files to batches in a reproducible order: readers, splits, augmentation, mixing."""
