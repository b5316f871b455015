"""From files to batches: readers, splits, augmentation and mixing, in a reproducible order."""
