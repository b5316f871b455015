"""Lines that say how far a long evaluation is."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable
from typing import TextIO

import jax

from flax_cnns.train.progress import format_duration
from flax_cnns.types import Batch

FIRST_AFTER_SECONDS = 20.0  # shorter evaluations print nothing
EVERY_SECONDS = 30.0


def report_batches(
    batches: Iterable[Batch], total: int, name: str, *, file: TextIO | None = None
) -> Generator[Batch]:
    """Yields the batches, and prints a line now and then on the primary process:

        test: 12,800 of 50,000 images, 83 images/s, ETA 0:07:28

    `total`: the images of all processes. The time left is measured from the second batch, so it
    excludes compiling.
    """
    begun, first, seen, due = 0.0, 0, 0, time.monotonic() + FIRST_AFTER_SECONDS
    for batch in batches:
        now = time.monotonic()
        if seen and not begun:
            begun, first = now, seen
        if now >= due and begun and now > begun and jax.process_index() == 0:
            speed = (seen - first) / (now - begun)
            left = f", ETA {format_duration((total - seen) / speed)}" if speed else ""
            print(
                f"{name}: {min(seen, total):,} of {total:,} images, {speed:,.0f} images/s{left}",
                file=file or sys.stdout,
                flush=True,
            )
            due = now + EVERY_SECONDS
        yield batch
        seen += len(batch["label"]) * jax.process_count()
