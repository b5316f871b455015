"""A reader's result, for tests."""

import numpy as np

from flax_cnns.data.readers.arrays import ArraySource
from flax_cnns.data.types import RawDataset


def raw(shape=(8, 8, 3), **sizes):
    rng = np.random.default_rng(0)
    return RawDataset(
        {
            name: ArraySource(
                rng.integers(0, 256, (n, 8, 8, 3), np.uint8), np.arange(n, dtype=np.int32) % 2, name
            )
            for name, n in sizes.items()
        },
        2,
        ("a", "b"),
        shape,
    )
